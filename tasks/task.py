"""What a task offers: rows to learn from, a grader, and the metrics it is graded by."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from transformers import PreTrainedTokenizerFast

from configs.schema import Section
from models.rows import Rows
from models.vocabulary import token_names


@dataclass(frozen=True)
class Metric:
    """One number that says how good a model is, or how faithful to its teacher.

    It is a ratio of two columns, each summed over the rows of a split; or, where `positions` is
    given, computed from the distributions of teacher and student at every position (see
    measure/metrics.py).

    heading: in tables and sentences, without the unit. unit: "%" for a fraction (shown times 100),
    else the unit as printed, such as "nats". lower_is_better: the direction that a verdict calls
    better. final_answer: whether it depends only on final answers, so that it also applies to
    models that write no reasoning. needs_teacher: whether it compares a model with its teacher.
    meaning: one line for the glossary of the report.
    """

    heading: str
    unit: str
    lower_is_better: bool
    numerator: str = ""
    denominator: str = "rows"
    final_answer: bool = False
    needs_teacher: bool = False
    meaning: str = ""
    steps: tuple[int, ...] = ()
    positions: Callable | None = None
    statistic: Callable[[np.ndarray], np.ndarray] | None = None

    @property
    def is_share(self) -> bool:
        return self.unit == "%"

    @property
    def scale(self) -> float:
        """The factor from a stored value to its unit."""
        return 100.0 if self.is_share else 1.0

    @property
    def digits(self) -> int:
        return 1 if self.is_share else 3

    @property
    def difference_unit(self) -> str:
        return "points" if self.is_share else self.unit

    @property
    def sign(self) -> int:
        """1 if higher is better, else -1: a difference times this is positive for the better."""
        return -1 if self.lower_is_better else 1


class Task:
    """The base class of tasks: what training, outputs and evaluation use.

    A task sets the class attributes, `tokenizer` or `vocabulary`, and implements the methods below
    that have no default; the config's rules read the attributes without loading any data.

    name: as in a config. item_noun: what a row is, in the plural. position_noun: what has
    a distribution over outcomes. examples: questions for `--ask`.
    familiar: held-out questions that people know the answers to, for the report.
    package: the installed package that ships its data, if any.
    evaluation_splits: the splits of the final evaluation, the main one first. metrics: how answers
    are graded, `{name: Metric}`, over the columns of `grade`; agreement: the same over the columns
    of `agree`, between a model's answers and the teacher's. headline: the metric in which gaps are
    stated. table: the metrics of the short table, in the console and the README.

    shows_reasoning: completions hold a chain of thought before the answer; the methods under that
    heading exist. steps: the numbers of reasoning steps of the problems in each split, where they
    are known. invents_prompts: a teacher can invent prompts. continues_text: a question is a text,
    and an answer its continuation.

    longest_answer and longest_row count tokens.
    """

    class Settings(Section):
        """The keys of this task under `task:` in a config, beside `name`."""

    name: ClassVar[str]
    item_noun: ClassVar[str] = "rows"
    position_noun: ClassVar[str] = "token"
    examples: ClassVar[tuple[str, ...]] = ()
    familiar: ClassVar[tuple[str, ...]] = ()
    package: ClassVar[str | None] = None
    evaluation_splits: ClassVar[tuple[str, ...]] = ("heldout",)
    metrics: ClassVar[dict[str, Metric]] = {}
    agreement: ClassVar[dict[str, Metric]] = {}
    headline: ClassVar[str]
    table: ClassVar[tuple[str, ...]] = ()
    shows_reasoning: ClassVar[bool] = False
    steps: ClassVar[dict[str, tuple[int, ...]]] = {}
    invents_prompts: ClassVar[bool] = False
    continues_text: ClassVar[bool] = False

    longest_answer: int
    longest_row: int
    # None for a task whose prompts are not text.
    tokenizer: PreTrainedTokenizerFast | None = None
    # The token that ends an invented prompt, and the one that ends the reasoning in an answer.
    separator: int | None = None
    end_of_reasoning: int | None = None

    def __init__(self, **settings: Any) -> None:
        self.settings = self.Settings(**settings)

    @property
    def data_licence(self) -> str:
        """The data and their licence, for model cards; nothing for data of one's own."""
        return ""

    @classmethod
    def objections(cls, settings: Section) -> Iterator[str]:
        """What is wrong with these settings; each line begins with the key."""
        return iter(())

    @classmethod
    def accuracy_at(cls, steps: int) -> str:
        """The accuracy metric of problems with this number of steps."""
        raise NotImplementedError

    # -- the outcomes that a model chooses from ------------------------------------------------

    @property
    def vocabulary(self) -> int:
        """How many outcomes a position has."""
        return len(self.tokenizer)

    @property
    def input_vocabulary(self) -> int:
        """How many different values a token of a row can have."""
        return self.vocabulary

    @property
    def pad(self) -> int:
        return self.tokenizer.pad_token_id

    @property
    def end(self) -> int:
        """The EOS token, which ends an answer; -1 for a task whose answers have none."""
        return self.tokenizer.eos_token_id

    def token_name(self, token: int) -> str:
        """One outcome, as a reader sees it; no two have the same name."""
        return self.names[int(token)]

    @cached_property
    def names(self) -> list[str]:
        return token_names(self.tokenizer)

    # -- rows and questions --------------------------------------------------------------------

    def rows(self, split: str) -> Rows:
        """The rows of `train`, `validation` or one of `evaluation_splits`."""
        raise NotImplementedError

    def overlap(self) -> float | None:
        """The share of the held-out text that the training text also holds, where that is free
        text."""
        return None

    # Whether the data has no answers, so that the teacher writes those of the evaluation splits.
    unanswered = False

    def prompts(self, split: str) -> Rows:
        """The rows whose prompts are asked of a teacher."""
        return self.rows(split)

    def adopt(self, split: str, rows: Rows) -> None:
        """unanswered: what the teacher wrote to the prompts of an evaluation split."""
        raise NotImplementedError

    def evaluation_rows(self, split: str) -> Rows:
        """The rows that models are evaluated on."""
        return self.rows(split)

    def prompt(self, question: str) -> list[int]:
        """The tokens of a question. LabError if it cannot be asked."""
        raise NotImplementedError

    def question(self, rows: Rows, i: int) -> str:
        """What row i asks, as text."""
        raise NotImplementedError

    def truths(self, question: str) -> list[str]:
        """All right answers, as `render` would write them; none where they are not known."""
        return []

    def render(self, tokens: np.ndarray | list[int]) -> str:
        """An answer as text, up to EOS."""
        raise NotImplementedError

    def encode_answer(self, text: str) -> list[int]:
        """The tokens of an answer as `render` writes it, without EOS. LabError for a text that has
        none."""
        raise NotImplementedError

    def image(self, rows: Rows, i: int) -> np.ndarray | None:
        """[height, width] from 0 to 255: the image of row i, for a task of images."""
        return None

    # -- grading -------------------------------------------------------------------------------

    def grade(self, ids: np.ndarray, answers: list[str]) -> dict[str, np.ndarray]:
        """Columns [N] for `metrics`: grades of the answers to the rows with these ids. With a
        column `wrong` (0 or 1) the evaluation measures how many teacher errors are copied."""
        raise NotImplementedError

    def agree(self, answers: list[str], teachers: list[str]) -> dict[str, np.ndarray]:
        """Columns [N] for `agreement`, besides whether the answers are the same text."""
        return {}

    def units(self, ids: np.ndarray) -> np.ndarray | None:
        """[N]: the group that each row was sampled with, as a number; intervals resample groups.
        None if rows are independent."""
        return None

    # -- invents_prompts -----------------------------------------------------------------------

    def invented_prompt_length(self, row: np.ndarray) -> int | None:
        """The length of the prompt in a row that a teacher invented; None if the row is malformed
        or its prompt belongs to an evaluation split."""
        raise NotImplementedError

    # -- shows_reasoning -----------------------------------------------------------------------

    def without_reasoning(self, completion: list[int]) -> list[int]:
        """An answer without the reasoning before it; empty if the completion has none."""
        raise NotImplementedError

    def is_right(self, rows: Rows, i: int) -> bool:
        """Whether row i ends with the right answer."""
        raise NotImplementedError

    def rewards(self, rows: Rows) -> np.ndarray:
        """[N]: 1 for a row that ends with the right answer, else 0."""
        return np.array([self.is_right(rows, i) for i in range(len(rows))], float)

    def final_answer(self, text: str) -> int | None:
        """The number that an answer ends with."""
        raise NotImplementedError

    def true_answer(self, rows: Rows, i: int) -> int:
        """The right number of row i."""
        raise NotImplementedError

    def step_count(self, rows: Rows, i: int) -> int:
        """How many steps the solution of row i has."""
        raise NotImplementedError

    def first_wrong_step(self, rows: Rows, i: int, text: str) -> int | None:
        """The first step of an answer, from 1, that is missing, wrong or superfluous; None if all
        are right."""
        raise NotImplementedError
