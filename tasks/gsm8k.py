"""The task `gsm8k`: real word problems of grade school, solved in plain English.

Source: Cobbe et al. 2021, arXiv 2110.14168, github.com/openai/grade-school-math (MIT licence):
7,473 training and 1,319 test problems. A solution ends with `#### 18`. For pretrained models, whose
tokenizer it uses.
"""

import hashlib
import multiprocessing
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from pydantic import Field

from configs.files import read_jsonl
from configs.schema import LabError, Section
from models.rows import Rows, row_id
from tasks.task import Metric, Task
from tasks.tokenizers import chat_prompt, open_tokenizer

HUB = "openai/gsm8k"
ASKS = "\nThink step by step. End with #### and the number."
# the 3 of 10-3 is not -3
NUMBER = re.compile(r"(?<![\d)])-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?")
VALIDATION = 5  # % of the training problems


def read_problems(folder: str | None, split: str) -> list[dict[str, str]]:
    """[{"question", "answer"}] of `train` or `test`, from a folder of JSONL or from the hub."""
    if folder is None:
        try:
            return list(datasets.load_dataset(HUB, "main", split=split))
        except Exception as error:
            raise LabError(
                f"{HUB} cannot be loaded from the hub ({type(error).__name__}); put train.jsonl "
                "and test.jsonl in a folder and name it in task.folder"
            ) from None
    file = Path(folder, f"{split}.jsonl")
    if not file.is_file():
        raise LabError(f"no file {file}; task.folder must hold train.jsonl and test.jsonl")
    problems = []
    for where, problem in read_jsonl(file):
        if not {"question", "answer"} <= problem.keys():
            raise LabError(f"{where}: expected an object with question and answer")
        problems.append({key: str(problem[key]) for key in ("question", "answer")})
    if not problems:
        raise LabError(f"{file} is empty; expected a problem on every line")
    return problems


def final_number(text: str) -> float | None:
    """The last number on the line of the first #### (what follows it is another problem), else the
    last number of the text."""
    text = text.replace("\u2212", "-")  # the minus sign of typeset text
    _, marked, after = text.rstrip("# \n").partition("####")
    numbers = NUMBER.findall(after.strip().partition("\n")[0].partition("####")[0])
    numbers = numbers if marked else NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def without_repeats(
    train: list[dict[str, str]], test: list[dict[str, str]]
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Every question once: a question with several answers is dropped, and a training question that
    is also tested. Prints how many."""
    answers: dict[str, set[float | None]] = {}
    for problem in (*train, *test):
        answers.setdefault(problem["question"], set()).add(final_number(problem["answer"]))
    seen: set[str] = {question for question, found in answers.items() if len(found) > 1}
    kept: list[list[dict[str, str]]] = []
    for problems in (test, train):
        kept.append([])
        for problem in problems:
            if problem["question"] not in seen:
                kept[-1].append(problem)
                seen.add(problem["question"])
    dropped = len(train) + len(test) - sum(map(len, kept))
    if dropped and multiprocessing.parent_process() is None:
        print(f"{dropped} problems are dropped: repeated, in both splits, or with two answers")
    return kept[1], kept[0]


class Gsm8k(Task):
    """Rows, tokenizer and grader."""

    class Settings(Section):
        tokenizer: str | None = None  # of the student: a folder, a GGUF file or a hub id
        folder: str | None = None  # where train.jsonl and test.jsonl are; null: from the hub
        limit: int | None = Field(None, ge=100)  # problems per split, at most

    name = "gsm8k"
    item_noun = "problems"
    examples = (
        "A robe takes 2 bolts of blue fiber and half that much white fiber. "
        "How many bolts in total does it take?",
    )
    metrics = {
        "accuracy": Metric(
            "right answers", "%", False, "right", final_answer=True,
            meaning="problems whose final number is right",
        )
    }  # fmt: skip
    agreement = {
        "answer_agreement": Metric(
            "agreement on the number", "%", False, "same_answer", final_answer=True,
            needs_teacher=True, meaning="problems with the same final number as the teacher's",
        ),
    }  # fmt: skip
    headline = "accuracy"
    table = ("accuracy", "answer_agreement", "kl_teacher_student")
    shows_reasoning = True
    longest_answer = 512  # tokens
    longest_row = 1024

    @classmethod
    def objections(cls, settings: Settings) -> Iterator[str]:
        if not settings.tokenizer:
            yield "tokenizer: missing; give the folder or hub id of the student's tokenizer"

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.tokenizer = open_tokenizer(self.settings.tokenizer)

    @cached_property
    def by_split(self) -> dict[str, list[dict[str, str]]]:
        """The published test problems are held out; validation is taken from the training problems,
        by a hash of the question."""
        train, test = (read_problems(self.settings.folder, split) for split in ("train", "test"))
        for problem in (*train, *test):
            if final_number(problem["answer"]) is None:
                raise LabError(
                    f"no number in the answer {problem['answer'][:40]!r} to the question "
                    f"{problem['question'][:40]!r}; {self.name} grades numbers"
                )
        train, test = without_repeats(train, test)
        found: dict[str, list[dict[str, str]]] = {"train": [], "validation": []}
        for problem in train:
            digest = hashlib.sha256(f"split {problem['question']}".encode()).digest()
            aside = int.from_bytes(digest[:8], "big") % 100 < VALIDATION
            found["validation" if aside else "train"].append(problem)
        found["heldout"] = test
        return {split: problems[: self.settings.limit] for split, problems in found.items()}

    @cached_property
    def by_id(self) -> dict[int, dict[str, str]]:
        return {self.id_of(p): p for problems in self.by_split.values() for p in problems}

    @property
    def data_licence(self) -> str:
        return "" if self.settings.folder else "GSM8K (MIT)"

    def id_of(self, problem: dict[str, str]) -> int:
        return row_id(f"gsm8k {problem['question']}")

    def rows(self, split: str) -> Rows:
        """The split as tokens: the question is the prompt, solution and EOS the completion."""
        problems = self.by_split[split]
        end = [self.tokenizer.eos_token_id]
        answers = [self.solution(problem) for problem in problems]
        encoded = [self.encode_answer(answer) for answer in answers]
        for problem, answer in zip(problems, encoded, strict=True):
            if len(answer) >= self.longest_row // 2:
                raise LabError(
                    f"a solution of {len(answer)} tokens, expected fewer than "
                    f"{self.longest_row // 2}: {problem['question'][:40]!r}..."
                )
        return Rows.build(
            [self.id_of(problem) for problem in problems],
            [self.prompt(problem["question"]) for problem in problems],
            [answer + end for answer in encoded],
        )

    def solution(self, problem: dict[str, str]) -> str:
        """As published, without calculator annotations such as `<<16-3-4=9>>`."""
        return re.sub(r"<<[^>]*>>", "", problem["answer"])

    def prompt(self, question: str) -> list[int]:
        """With the chat template of the tokenizer, if it has one."""
        ids = chat_prompt(self.tokenizer, [{"role": "user", "content": question + ASKS}])
        if ids is None:
            ids = self.tokenizer(f"Question: {question}{ASKS}\nAnswer: ")["input_ids"]
            if ids[-1] == self.tokenizer.eos_token_id:
                ids = ids[:-1]  # some tokenizers end every text
        if len(ids) > self.longest_row - self.longest_answer:
            raise LabError(
                f"a question of {len(ids)} tokens, expected at most "
                f"{self.longest_row - self.longest_answer}: {question[:40]!r}..."
            )
        return ids

    @property
    def vocabulary(self) -> int:
        """Ids may have holes."""
        return max(self.tokenizer.get_vocab().values()) + 1

    def encode_answer(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def question(self, rows: Rows, i: int) -> str:
        return self.by_id[int(rows.ids[i])]["question"]

    def truths(self, question: str) -> list[str]:
        problem = self.by_id.get(self.id_of({"question": question}))
        return [self.solution(problem)] if problem else []

    def render(self, tokens: np.ndarray | list[int]) -> str:
        """An answer as text, up to EOS."""
        ids = [int(token) for token in tokens]
        end = self.tokenizer.eos_token_id
        ids = ids[: ids.index(end)] if end in ids else ids
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def grade(self, ids: np.ndarray, answers: list[str]) -> dict[str, np.ndarray]:
        """Per row: whether the answer ends with the right number. A truncated answer is graded by
        its last number, as usual; answers that students learn from must be complete, see
        `is_right`."""
        numbers = map(final_number, answers)
        truths = [final_number(self.by_id[int(i)]["answer"]) for i in ids]
        right = np.array([a == truth for a, truth in zip(numbers, truths, strict=True)], float)
        return {"right": right, "wrong": 1 - right}

    def agree(self, answers: list[str], teachers: list[str]) -> dict[str, np.ndarray]:
        """Per row: whether it ends with the teacher's number."""
        pairs = zip(map(final_number, answers), map(final_number, teachers), strict=True)
        return {"same_answer": np.array([a == t is not None for a, t in pairs], float)}

    def is_right(self, rows: Rows, i: int) -> bool:
        """A truncated answer is not right, whatever its last number."""
        completion = rows.completion(i).tolist()
        number = final_number(self.render(completion))
        ended = completion[-1] == self.tokenizer.eos_token_id
        return ended and number == final_number(self.by_id[int(rows.ids[i])]["answer"])

    def without_reasoning(self, completion: list[int]) -> list[int]:
        """`...#### 18` or `... it is 18.` -> `#### 18`; empty if there is no number."""
        number = final_number(self.render(completion))
        if number is None:
            return []
        return [*self.encode_answer(f"#### {number:.15g}"), self.tokenizer.eos_token_id]
