"""What a task offers: rows to learn from, a tokenizer, and a grader."""

from typing import Protocol

import numpy as np
from transformers import PreTrainedTokenizerFast

from tasks.rows import Rows

Ratio = tuple[str, str]  # the columns whose sums a metric divides


class Task(Protocol):
    """The training, the outputs and the evaluation know no more of a task than this.

    tokens: the vocabulary by id. separator: the token that ends a prompt. longest_answer and
    longest_row: tokens. judged: the splits of the final evaluation, the main one first. things:
    what its rows are, for people. example: what a reader may ask its models.
    quality, agreement: {metric: (numerator, denominator)}, columns of `grade` and `agree`, or
    `rows`. headline: the metric of quality in which gaps are told.
    """

    name: str
    things: str
    example: list[str]
    judged: tuple[str, ...]
    longest_answer: int
    longest_row: int
    tokenizer: PreTrainedTokenizerFast
    tokens: list[str]
    separator: int
    quality: dict[str, Ratio]
    agreement: dict[str, Ratio]
    headline: str

    def rows(self, split: str) -> Rows:
        """train, validation, or one of `judged`."""

    def prompt(self, question: str) -> list[int]:
        """The ids that ask it. LabError names what cannot be asked."""

    def question(self, rows: Rows, i: int) -> str:
        """What row i asks, as text."""

    def truths(self, question: str) -> list[str]:
        """All right answers, as `render` would write them; none where they are not known."""

    def render(self, tokens: np.ndarray | list[int]) -> str:
        """An answer as text, up to the end mark."""

    def units(self, ids: np.ndarray) -> np.ndarray | None:
        """[N]: which rows are alike, as a number; they are drawn together where intervals are made.
        None: every row stands for itself."""

    def encode_answer(self, text: str) -> list[int]:
        """The tokens of an answer, without an end mark. Tasks of pretrained models have this."""

    def grade(self, ids: np.ndarray, answers: list[str]) -> dict[str, np.ndarray]:
        """Columns [N]: how good the answers to the rows of these ids are; `wrong` among them."""

    def rewards(self, rows: Rows) -> np.ndarray:
        """[N] from 0 to 1: how good the answers in these rows are. Tasks that reason have this and
        what follows."""

    def is_right(self, rows: Rows, i: int) -> bool:
        """Does row i end with the right answer?"""

    def without_trace(self, completion: list[int]) -> list[int]:
        """An answer without the reasoning before it; empty if it came to none."""

    def agree(self, answers: list[str], teachers: list[str]) -> dict[str, np.ndarray]:
        """Columns [N]: how far they say what the teacher says, beyond being the same text."""


def in_words_of(own: Task, task: Task, rows: Rows) -> Rows:
    """The prompts of some rows as `own` has them: the same task with another tokenizer."""
    if own is task:
        return rows
    prompts = [own.prompt(task.question(rows, i)) for i in range(len(rows))]
    return Rows.build(rows.ids[np.arange(len(rows))].tolist(), prompts, [[] for _ in prompts])
