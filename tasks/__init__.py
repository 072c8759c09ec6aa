"""What is learned: rows of prompt -> completion, a tokenizer and a grader."""

from configs.schema import Task as TaskConfig
from tasks.pronounce import Pronounce


def load_task(config: TaskConfig) -> Pronounce:
    """The task that a config names."""
    return {"pronounce": Pronounce}[config.name](limit=config.limit)
