"""What is learned: one file per task, and the table TASKS of them all.

The table is imported when it is asked for: reading a data file needs no transformers.
"""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    if name in ("TASKS", "load_task"):
        return getattr(import_module("tasks.table"), name)
    raise AttributeError(f"module 'tasks' has no attribute {name!r}")
