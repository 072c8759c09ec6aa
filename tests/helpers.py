"""What several test files use."""

from types import SimpleNamespace

from student.objectives import OBJECTIVES

DIVERGENCES = [name for name, term in OBJECTIVES.items() if term.compares_distributions]


def task_with(tokenizer, longest_row):
    """As much of a task as a model is built for."""
    return SimpleNamespace(
        name="test", tokenizer=tokenizer, vocabulary=len(tokenizer), longest_row=longest_row
    )
