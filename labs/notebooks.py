"""Notebooks of the labs: to read, with outputs and pictures; to work in; and with the solutions.

    python -m labs build --out notebooks

The labs' own files stay the only source.
"""

from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from configs.files import say, write_atomically
from configs.schema import LabError
from labs.source import FOLDER, exercise_edition, lab_file, solution_edition

SECONDS = 600  # of a cell


def notebook_of(text: str) -> nbformat.NotebookNode:
    return jupytext.reads(text, fmt="py:percent")


def executed(notebook: nbformat.NotebookNode, name: str) -> nbformat.NotebookNode:
    """With the output of every cell. LabError for one that fails."""
    client = NotebookClient(
        notebook, timeout=SECONDS, resources={"metadata": {"path": str(FOLDER.parent)}}
    )
    try:
        return client.execute()
    except CellExecutionError as error:
        raise LabError(f"{name}: a cell failed: {error.ename}: {error.evalue}") from None


def build(numbers: list[int], out: Path) -> None:
    """Three notebooks of each lab, in a folder."""
    for number in numbers:
        source = lab_file(number)
        text = source.read_text(encoding="utf-8")
        solved = solution_edition(text)
        notebooks = {
            "read": executed(notebook_of(solved), source.stem),
            "exercises": notebook_of(exercise_edition(text)),
            "solutions": notebook_of(solved),
        }
        for edition, notebook in notebooks.items():
            file = out / f"{source.stem}.{edition}.ipynb"
            write_atomically(file, nbformat.writes(notebook) + "\n")
            say(str(file))
