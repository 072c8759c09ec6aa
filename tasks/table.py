"""What is learned: the table TASKS, one file per task."""

from configs.schema import TaskConfig
from tasks.digits import Digits
from tasks.gsm8k import Gsm8k
from tasks.instruct import Instruct
from tasks.pronounce import Pronounce
from tasks.reason import Reason
from tasks.stories import Stories
from tasks.task import Task
from tasks.text import Text

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (Pronounce, Reason, Digits, Text, Instruct, Stories, Gsm8k)
}


def load_task(config: TaskConfig) -> Task:
    """The task that a config names, with its data."""
    return TASKS[config.name](**config.settings)
