"""A result in a terminal of any width."""

import shutil
import textwrap
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from measure.report.tables import facts_of, models_table, more_tables

NO_TERMINAL = 120  # columns, where the output goes to a file


def print_result(result: dict[str, Any]) -> None:
    """The models, what was found about them, and what it cost."""
    width = shutil.get_terminal_size((NO_TERMINAL, 24)).columns
    console = Console(width=width)
    for title, headings, rows in [models_table(result, interval=True), *more_tables(result)]:
        print(f"\n{textwrap.fill(title, width)}")
        for table in fitting(headings, rows, width):
            console.print(table)
    for fact in facts_of(result):
        print(textwrap.fill(fact, width, subsequent_indent="  ", break_on_hyphens=False))


def fitting(headings: list[str], rows: list[list[str]], width: int) -> list[Table]:
    """As many tables as it takes: each has the first column, and those of the others that fit."""
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
            table.add_column(Text(heading), justify="right" if place else "left", no_wrap=True)
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
