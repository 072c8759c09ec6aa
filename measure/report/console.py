"""Results and answers in a terminal of any width."""

import shutil
import textwrap
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from configs.files import say
from measure.evaluate import Answers
from measure.report.sentences import facts_of
from measure.report.tables import models_table, more_tables
from models.rows import Rows
from tasks.task import Task

NO_TERMINAL = 120  # columns, where the output goes to a file


def terminal_width() -> int:
    return shutil.get_terminal_size((NO_TERMINAL, 24)).columns


def print_result(result: dict[str, Any]) -> None:
    """The models, what was found about them, and what it cost."""
    width = terminal_width()
    console = Console(width=width)
    for title, headings, rows in [models_table(result, interval=True), *more_tables(result)]:
        print(f"\n{textwrap.fill(title, width)}")
        for table in fitting(headings, rows, width):
            console.print(table)
    for fact in facts_of(result):
        print(textwrap.fill(fact, width, subsequent_indent="  ", break_on_hyphens=False))


def print_answers(
    question: str, answers: dict[str, Answers], task: Task, splits: dict[str, Rows]
) -> None:
    """What each model answers to one question, and which of the answers are right."""
    width, truths = terminal_width(), task.truths(question)
    rows = [["right answer", shortened(" | ".join(truths), width) or "not known", "", ""]]
    for model, answer in answers.items():
        (text,), (log_prob,) = answer.texts, answer.log_probs
        mark = grade_of(text, truths, task)
        rows.append([model, shortened(text, width), mark, f"{np.exp(log_prob):.3f}"])
    say(f"\n{question} ({place_in(splits, task.prompt(question))})")
    for table in fitting(["", "answer", "grade", "p"], rows, width, left=3):
        Console(width=width).print(table)


def shortened(text: str, width: int) -> str:
    """An answer that leaves room for its model, its grade and its probability."""
    return textwrap.shorten(text, max(30, width - 48), placeholder=" ...")


def grade_of(text: str, truths: list[str], task: Task) -> str:
    """Nothing where right answers are not known, or where others would be as good."""
    if not truths or task.metrics[task.headline].numerator not in ("right", "wrong"):
        return ""
    if task.shows_reasoning:
        return "right" if task.final_answer(text) in map(task.final_answer, truths) else "wrong"
    return "right" if text in truths else "wrong"


def place_in(splits: dict[str, Rows], asked: list[int]) -> str:
    """Where a prompt is in the data, and whether models have seen it in training."""
    for split, rows in splits.items():
        candidates = np.flatnonzero(rows.prompt_lengths == len(asked))
        if any(rows.prompt(i).tolist() == asked for i in candidates):
            return "seen in training" if split == "train" else f"{split}, not seen in training"
    return "not in the data"


def fitting(headings: list[str], rows: list[list[str]], width: int, left: int = 1) -> list[Table]:
    """As many tables as it takes: each has the first column, and those of the others that fit. The
    first `left` columns are aligned to the left."""
    columns = [
        [wrapped(heading, cells), *cells]
        for heading, *cells in zip(headings, *broken(rows), strict=True)
    ]
    first, *others = columns
    groups: list[list[list[str]]] = [[first]]
    for column in others:
        if len(groups[-1]) > 1 and width_of([*groups[-1], column]) > width:
            groups.append([first])
        groups[-1].append(column)
    tables = []
    for group in groups:
        table = Table(box=box.ASCII)
        for place, (heading, *_) in enumerate(group):
            side = "right" if place >= left else "left"
            table.add_column(Text(heading), justify=side, no_wrap=True)
        for cells in zip(*(cells for _, *cells in group), strict=True):
            table.add_row(*map(Text, cells))
        tables.append(table)
    return tables


def broken(rows: list[list[str]]) -> list[list[str]]:
    """What a cell says of other runs goes on a line of its own."""
    return [[cell.replace("; ", "\n") for cell in row] for row in rows]


def wrapped(heading: str, cells: list[str]) -> str:
    """A heading in several lines, about as wide as its column."""
    wide = max(map(line_width, cells), default=0)
    longest = max(map(len, heading.split()), default=0)
    return textwrap.fill(heading, max(wide, longest, 10)) if heading else ""


def line_width(cell: str) -> int:
    return max(map(len, cell.split("\n")))


def width_of(columns: list[list[str]]) -> int:
    """Of a table with borders: every column has a space on both sides and a bar."""
    return 1 + sum(max(map(line_width, column)) + 3 for column in columns)
