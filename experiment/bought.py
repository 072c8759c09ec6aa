"""A teacher behind an endpoint, whose weights are unknown: what a run knows of it.

In place of a model, the folder `teacher` has a file with who it is, since when, and its greedy
answers to rows of the evaluation splits, which is all that students can be compared with.
"""

import numpy as np

from configs.files import Shape, read_sealed, sha256_of_file, write_sealed
from configs.schema import Config, LabError
from experiment.run import Run
from models.rows import Rows
from tasks.task import Task

FILE = "endpoint.json"
# Keys of teacher.api that say whose answers they are, and by whose leave they are used.
IDENTITY = {"url", "model", "endpoint", "body", "permission", "evaluation_rows"}
PROBED = 16  # answers that tell whether the model behind a name has changed


class Bought(Shape):
    """answers: {split: {row id: text}}. since: a date."""

    url: str
    model: str
    terms: str
    since: str
    answers: dict[str, dict[str, str]]


def write_bought(run: Run, found: Bought) -> dict[str, str]:
    """Returns the hash of the file by its name, for the manifest."""
    run.teacher.mkdir(parents=True, exist_ok=True)
    write_sealed(run.teacher / FILE, found.model_dump())
    return {FILE: sha256_of_file(run.teacher / FILE)}


def open_bought(run: Run) -> Bought:
    """LabError if it is not what the manifest records."""
    file = run.teacher / FILE
    if sha256_of_file(file) != run.manifest["stages"]["teacher"]["files"][FILE]:
        raise LabError(
            f"{file} is not the one that this run saved (sha256 differs); move that folder "
            "elsewhere and run train.py on the config again"
        )
    return Bought(**read_sealed(file, Bought))


def evaluated_rows(config: Config, task: Task, split: str) -> Rows:
    """The rows of a split that models are evaluated on: all, or those that an endpoint is asked
    for."""
    rows = task.evaluation_rows(split)
    return lowest(rows, config.teacher.api.evaluation_rows) if config.sold_elsewhere else rows


def lowest(rows: Rows, count: int) -> Rows:
    """Those with the lowest ids: ids are hashes."""
    return rows.take(np.sort(np.argsort(rows.ids, kind="stable")[:count]))
