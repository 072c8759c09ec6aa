"""What is learned: rows of prompt -> completion, a tokenizer and a grader."""

from configs.schema import Task as TaskConfig
from tasks.gsm8k import Gsm8k
from tasks.pronounce import Pronounce
from tasks.reason import Reason
from tasks.task import Task


def load_task(config: TaskConfig) -> Task:
    """The task that a config names."""
    if config.name == "gsm8k":
        return Gsm8k(config.tokenizer, config.folder, config.limit)
    return {"pronounce": Pronounce, "reason": Reason}[config.name](limit=config.limit)
