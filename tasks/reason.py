"""The task `reason`: word problems with a chain of steps as their solution.

    A box holds 7 pens. 5 more go in. 3 are taken out. How many are in the box?
    <think> 7+5=12;12-3=9 </think> 9

Made by code, unlimited and verifiable. Numbers are written digit by digit. All operands are from
2 to 9 and all values lie between 0 and 99. Difficulty is the number of steps: 1 to 5 train, 6 to 8
are the second held-out set. What is asked is an arithmetic problem like `7+5-3`, whatever its
words. The hash of its beginning, `7+5`, decides the split: so no test problem ever occurs in
training, nor the beginning of one, nor one that continues it. The sums themselves do: a chain
of one or two steps, now and then of three, stands somewhere in the middle of a training trace.
"""

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
from pydantic import Field
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from configs.schema import LabError, Section
from models.rows import Rows, row_id
from tasks.task import Metric, Task

THINK, ANSWER = "<think>", "</think>"
SPECIALS = ["<pad>", "<s>", "</s>", THINK, ANSWER]
SYMBOLS = [*"0123456789", *"+-=;.?"]
TRAINED, LONGEST = 5, 8  # steps
PROBLEMS = 160_000  # for training, unless the config says otherwise
JUDGED = 200  # per number of steps, in each of the other splits
HARD = (4, 5)  # steps: where answers alone fall behind

# (opening, what adds, what takes away, question); {} is a number
SCENES = [
    (
        "A box holds {} pens.",
        ["{} more go in.", "{} are added."],
        ["{} are taken out.", "{} are lost."],
        "How many are in the box?",
    ),
    (
        "A bus carries {} people.",
        ["{} get on.", "{} more step in."],
        ["{} get off.", "{} leave."],
        "How many are on the bus?",
    ),
    (
        "A tree has {} birds.",
        ["{} land.", "{} more come."],
        ["{} fly away.", "{} leave."],
        "How many are in the tree?",
    ),
    (
        "A shelf has {} books.",
        ["{} are added.", "{} are put back."],
        ["{} are borrowed.", "{} are sold."],
        "How many are on the shelf?",
    ),
    (
        "A farm has {} hens.",
        ["{} hatch.", "{} more are bought."],
        ["{} are sold.", "{} run away."],
        "How many are on the farm?",
    ),
]


@dataclass(frozen=True)
class Problem:
    """start, then one signed one-digit operand per step; scene and verbs are words only."""

    start: int
    operands: tuple[int, ...]
    scene: int
    verbs: tuple[int, ...]

    @property
    def canonical(self) -> str:
        """`7+5-3`"""
        return str(self.start) + "".join(f"{operand:+d}" for operand in self.operands)

    @property
    def values(self) -> list[int]:
        """After every step."""
        return list(accumulate(self.operands, initial=self.start))[1:]

    @property
    def question(self) -> str:
        opening, adds, takes, asks = SCENES[self.scene]
        steps = [
            (adds if operand > 0 else takes)[verb].format(abs(operand))
            for operand, verb in zip(self.operands, self.verbs, strict=True)
        ]
        return " ".join([opening.format(self.start), *steps, asks])

    @property
    def steps(self) -> list[tuple[int, int, int]]:
        """(before, operand, after) of every step."""
        before = [self.start, *self.values[:-1]]
        return list(zip(before, self.operands, self.values, strict=True))

    @property
    def trace(self) -> str:
        """`7+5=12;12-3=9`"""
        return ";".join(f"{before}{operand:+d}={after}" for before, operand, after in self.steps)

    @property
    def answer(self) -> str:
        return str(self.values[-1])


def first_of(canonical: str) -> str:
    """`7+5-3` -> `7+5`"""
    return re.match(r"\d+[+-]\d", canonical)[0]


def split_of(canonical: str) -> str:
    """train, validation or heldout (90/5/5) by a hash of the first step: the same everywhere. From
    6 steps on: long, if it begins as the held-out ones do, else none."""
    first = first_of(canonical)
    rest = canonical.removeprefix(first)
    bucket = int.from_bytes(hashlib.sha256(f"split {first}".encode()).digest()[:8], "big") % 100
    split = "train" if bucket < 90 else "validation" if bucket < 95 else "heldout"
    if 1 + len(re.findall(r"[+-]", rest)) <= TRAINED:
        return split
    return "long" if split == "heldout" else "none"


def read_problem(question: str) -> Problem | None:
    """The problem that a question in plain English asks; None if no scene has its sentences."""
    sentences = [" ".join(part.split()) for part in re.findall(r"[^.?]+[.?]", question)]
    if len(sentences) < 3:
        return None
    first, *middle, last = sentences
    for scene, (opening, adds, takes, asks) in enumerate(SCENES):
        start = number_in(opening, first)
        if start is None or last != asks:
            continue
        operands, verbs = [], []
        for sentence in middle:
            for sign, templates in ((1, adds), (-1, takes)):
                for verb, template in enumerate(templates):
                    if (number := number_in(template, sentence)) is not None:
                        operands.append(sign * number)
                        verbs.append(verb)
        if len(operands) == len(middle):
            return Problem(start, tuple(operands), scene, tuple(verbs))
    return None


def number_in(template: str, sentence: str) -> int | None:
    found = re.fullmatch(re.escape(template).replace(r"\{\}", r"(\d+)"), sentence)
    return int(found[1]) if found else None


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, digit and sign; all that the scenes use."""
    texts = [
        text for opening, adds, takes, asks in SCENES for text in (opening, *adds, *takes, asks)
    ]
    words = sorted({word for text in texts for word in re.findall(r"[A-Za-z]+", text)})
    vocabulary = {token: i for i, token in enumerate([*SPECIALS, *SYMBOLS, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex(r"</?think>|[A-Za-z]+|[0-9]|[^A-Za-z0-9\s]"), "isolated"),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


@dataclass
class Solution:
    """What an answer says: its steps as (before, operand, after), None for one that cannot be read,
    and its final number, None if there is none."""

    steps: list[tuple[int, int, int] | None]
    answer: int | None


def read_solution(text: str) -> Solution:
    """`<think> 7+5=12;12-3=9 </think> 9`, or what a model made of it."""
    thought, marked, said = text.replace(" ", "").partition(ANSWER)
    if not marked and THINK not in text:
        thought, said = "", thought
    steps: list[tuple[int, int, int] | None] = []
    for step in thought.replace(THINK, "").split(";") if thought else []:
        found = re.fullmatch(r"(\d{1,2})([+-]\d)=(\d{1,2})", step)
        steps.append(tuple(map(int, found.groups())) if found else None)
    return Solution(steps, int(said) if re.fullmatch(r"\d{1,2}", said) else None)


Step = tuple[int, int, int]


def same_steps(said: list[Step | None], expected: list[Step | None]) -> int:
    """How many of the expected steps stand at their place."""
    return sum(a == b is not None for a, b in zip(said, expected, strict=False))


def first_wrong_step(said: list[Step | None], expected: list[Step]) -> int | None:
    """The first step, from 1, that is missing, wrong or one too many; None if all are right."""
    for place, step in enumerate(expected):
        if place >= len(said) or said[place] != step:
            return place + 1
    return None if len(said) == len(expected) else len(expected) + 1


def has_sound_steps(solution: Solution) -> bool:
    """Whether every stated step is right arithmetic and starts where the step before it ended.
    They may still be the steps of another question."""
    if not solution.steps or None in solution.steps:
        return False
    chained = all(a[2] == b[0] for a, b in zip(solution.steps, solution.steps[1:], strict=False))
    return chained and all(before + operand == after for before, operand, after in solution.steps)


def answer_follows(solution: Solution) -> bool:
    """Whether the answer is the result of the last stated step, right or wrong."""
    last = solution.steps[-1] if solution.steps else None
    return last is not None and solution.answer == last[2]


def is_faithful(solution: Solution) -> bool:
    """Whether the stated steps are sound and the answer is their result."""
    return has_sound_steps(solution) and answer_follows(solution)


def accuracies() -> dict[str, Metric]:
    """Right answers in all, and by number of steps."""
    found = {"accuracy": Metric("right answers", "%", False, "right", final_answer=True)}
    for steps in [*((n,) for n in range(1, LONGEST + 1)), HARD]:
        name, words = "_".join(map(str, steps)), " and ".join(map(str, steps))
        found[f"accuracy_{name}"] = Metric(
            f"right answers at {words} step{'s' if steps != (1,) else ''}",
            "%",
            False,
            f"right_{name}",
            f"rows_{name}",
            final_answer=True,
            steps=steps,
        )
    return found


class Reason(Task):
    """Rows, tokenizer and grader."""

    class Settings(Section):
        limit: int | None = Field(None, ge=100)  # how many problems for training

    name = "reason"
    item_noun = "problems"
    examples = ("A box holds 7 pens. 5 more go in. 3 are taken out. How many are in the box?",)
    evaluation_splits = ("heldout", "long")
    metrics = accuracies() | {
        "right_steps": Metric("right steps", "%", False, "right_steps", "steps"),
        "sound_steps": Metric("sound steps", "%", False, "sound"),
        "answer_follows": Metric("answer follows", "%", False, "follows"),
        "faithfulness": Metric("faithful traces", "%", False, "faithful"),
    }
    agreement = {
        "answer_agreement": Metric(
            "agreement on the number", "%", False, "same_answer", final_answer=True,
            needs_teacher=True,
        ),
        "step_agreement": Metric(
            "agreement on steps", "%", False, "same_steps", "teachers_steps", needs_teacher=True
        ),
    }  # fmt: skip
    headline = "accuracy"
    table = ("accuracy", "accuracy_4_5", "faithfulness", "answer_agreement", "step_agreement")
    shows_reasoning = True
    steps = {
        "heldout": tuple(range(1, TRAINED + 1)),
        "long": tuple(range(TRAINED + 1, LONGEST + 1)),
    }
    longest_answer = 80  # tokens; eight steps take 68
    longest_row = 160

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.tokenizer = build_tokenizer()
        self.token_ids = dict(self.tokenizer.get_vocab())
        self.tokens = sorted(self.token_ids, key=self.token_ids.get)
        self.separator = self.token_ids["?"]
        self.end_of_reasoning = self.token_ids[ANSWER]

    @classmethod
    def accuracy_at(cls, steps: int) -> str:
        return f"accuracy_{steps}"

    def token_name(self, token: int) -> str:
        return self.tokens[token]

    @cached_property
    def by_split(self) -> dict[str, list[Problem]]:
        """The distinct problems of every split: equally many of each number of steps, except that
        fewer exist with one step."""
        wanted = {"train": -(-(self.settings.limit or PROBLEMS) // TRAINED)}
        found: dict[str, list[Problem]] = {}
        for number, split in enumerate(("train", "validation", "heldout", "long")):
            lengths = range(TRAINED + 1, LONGEST + 1) if split == "long" else range(1, TRAINED + 1)
            found[split] = []
            for steps in lengths:
                generator = np.random.Generator(np.random.PCG64([number, steps]))
                count = wanted.get(split, min(JUDGED, wanted["train"] // TRAINED))
                found[split] += distinct_problems(split, count, steps, generator)
        return found

    @cached_property
    def by_id(self) -> dict[int, Problem]:
        return {self.id_of(p): p for problems in self.by_split.values() for p in problems}

    def id_of(self, problem: Problem) -> int:
        return row_id(f"reason {problem.question}")

    def rows(self, split: str) -> Rows:
        """The split as tokens: `<s> question` asks, `<think> steps </think> answer </s>` follows"""
        problems = self.by_split[split]
        return Rows.build(
            [self.id_of(problem) for problem in problems],
            [self.prompt(problem.question) for problem in problems],
            [
                self.encode(f"{THINK} {problem.trace} {ANSWER} {problem.answer} </s>")
                for problem in problems
            ],
        )

    def encode(self, text: str) -> list[int]:
        """Token ids. LabError names a word that is not in the vocabulary."""
        pieces = self.pieces(text)
        for piece in pieces:
            if piece not in self.token_ids:
                raise LabError(
                    f"{piece[:30]!r} is not in the vocabulary of {self.name}; it knows "
                    f"{', '.join(t for t in self.tokens if t.isalpha())}"
                )
        return [self.token_ids[piece] for piece in pieces]

    def pieces(self, text: str) -> list[str]:
        return re.findall(r"</?think>|</s>|[A-Za-z]+|[0-9]|[^A-Za-z0-9\s]", text)

    def prompt(self, question: str) -> list[int]:
        """The ids of `<s> question ?`."""
        ids = [self.tokenizer.bos_token_id, *self.encode(question)]
        longest = self.longest_row - self.longest_answer
        if not 2 <= len(ids) <= longest:
            raise LabError(f"the question has {len(ids) - 1} words, expected 1 to {longest - 1}")
        return ids

    def units(self, ids: np.ndarray) -> np.ndarray:
        """Problems that begin alike, which is what the split was drawn by."""
        firsts = [first_of(self.by_id[int(i)].canonical) for i in ids]
        return np.unique(firsts, return_inverse=True)[1]

    def question(self, rows: Rows, i: int) -> str:
        return self.by_id[int(rows.ids[i])].question

    def truths(self, question: str) -> list[str]:
        """The solution of a question of one of the scenes."""
        problem = read_problem(question)
        return [f"{THINK} {problem.trace} {ANSWER} {problem.answer}"] if problem else []

    def render(self, tokens: np.ndarray | list[int]) -> str:
        """Answer tokens as text, up to the end mark: `<think> 7+5=12;12-3=9 </think> 9`."""
        words = [self.tokens[t] for t in tokens]
        words = words[: words.index("</s>")] if "</s>" in words else words
        spaced = [f" {word} " if word in (THINK, ANSWER) else word for word in words]
        return "".join(spaced).strip()

    def grade(self, ids: np.ndarray, answers: list[str]) -> dict[str, np.ndarray]:
        """Per row: whether the answer is right, and the same by number of steps; how many of the
        problem's steps are stated, rightly and in their place; whether the stated steps are sound,
        the answer follows from them, and both."""
        problems = [self.by_id[int(i)] for i in ids]
        solutions = [read_solution(answer) for answer in answers]
        pairs = list(zip(solutions, problems, strict=True))
        steps = np.array([len(problem.operands) for problem in problems])
        right = np.array([str(s.answer) == p.answer for s, p in pairs], float)
        columns = {
            "right": right,
            "wrong": 1 - right,
            "steps": steps.astype(float),
            "right_steps": np.array([same_steps(s.steps, p.steps) for s, p in pairs], float),
            "sound": np.array([has_sound_steps(s) for s in solutions], float),
            "follows": np.array([answer_follows(s) for s in solutions], float),
            "faithful": np.array([is_faithful(s) for s in solutions], float),
        }
        for among in [*((n,) for n in range(1, LONGEST + 1)), HARD]:
            name = "_".join(map(str, among))
            columns[f"rows_{name}"] = np.isin(steps, among).astype(float)
            columns[f"right_{name}"] = right * columns[f"rows_{name}"]
        return columns

    def agree(self, answers: list[str], teachers: list[str]) -> dict[str, np.ndarray]:
        """Per row: whether both end with one number, and how many of the teacher's steps are stated
        at their place."""
        pairs = [
            (read_solution(a), read_solution(t)) for a, t in zip(answers, teachers, strict=True)
        ]
        return {
            "same_answer": np.array([a.answer == t.answer is not None for a, t in pairs], float),
            "same_steps": np.array([same_steps(a.steps, t.steps) for a, t in pairs], float),
            "teachers_steps": np.array([len(t.steps) for _, t in pairs], float),
        }

    def without_reasoning(self, completion: list[int]) -> list[int]:
        """`<think> ... </think> 9 </s>` -> `9 </s>`; nothing, if its thinking has no end."""
        place = (
            completion.index(self.end_of_reasoning)
            if self.end_of_reasoning in completion
            else len(completion)
        )
        return completion[place + 1 :]

    def is_right(self, rows: Rows, i: int) -> bool:
        """Does row i end with the right answer?"""
        said = read_solution(self.render(rows.completion(i).tolist()))
        return str(said.answer) == self.by_id[int(rows.ids[i])].answer

    def final_answer(self, text: str) -> int | None:
        return read_solution(text).answer

    def true_answer(self, rows: Rows, i: int) -> int:
        return int(self.by_id[int(rows.ids[i])].answer)

    def step_count(self, rows: Rows, i: int) -> int:
        return len(self.by_id[int(rows.ids[i])].steps)

    def first_wrong_step(self, rows: Rows, i: int, text: str) -> int | None:
        return first_wrong_step(read_solution(text).steps, self.by_id[int(rows.ids[i])].steps)


def distinct_problems(
    split: str, count: int, steps: int, generator: np.random.Generator
) -> list[Problem]:
    """Problems of one split, at random; fewer where there are no more. Evaluation problems differ
    in arithmetic, training problems at least in words. A step out of 0 to 99 is reversed."""
    found: dict[tuple, Problem] = {}
    splits: dict[str, str] = {}  # the hash of a problem tells; there are few short ones
    for _ in range(12):
        drawn = max(2 * count, 4000)
        starts = generator.integers(2, 100, drawn)
        signs = generator.choice([-1, 1], (drawn, steps))
        operands = generator.integers(2, 10, (drawn, steps)) * signs
        values = starts.copy()
        for step in range(steps):
            reached = values + operands[:, step]
            operands[:, step] *= np.where((reached < 0) | (reached > 99), -1, 1)
            values = values + operands[:, step]
        scenes = generator.integers(0, len(SCENES), drawn)
        verbs = generator.integers(0, 2, (drawn, steps))
        for start, signed, scene, verb in zip(
            *(column.tolist() for column in (starts, operands, scenes, verbs)), strict=True
        ):
            key = (start, *signed, scene, *verb) if split == "train" else (start, *signed)
            if key in found:
                continue
            canonical = f"{start}" + "".join([f"{operand:+d}" for operand in signed])
            if canonical not in splits:
                splits[canonical] = split_of(canonical)
            if splits[canonical] == split:
                found[key] = Problem(start, tuple(signed), scene, tuple(verb))
                if len(found) == count:
                    return list(found.values())
    return list(found.values())
