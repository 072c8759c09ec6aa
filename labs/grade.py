"""Grade submissions: one JSON each, in the formats of the services that courses use.

The checks run here, and only call the submission's functions, in a process of its own.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from configs.files import say, write_json
from configs.schema import LabError
from labs.source import FOLDER, lab_file

PATIENCE = 300.0  # seconds for all checks of a submission
ROOT = FOLDER.parent
# {field of result.json: environment variable} of Classroom 50's runner
OF_RUNNER = {
    "classroom": "CLASSROOM", "assignment": "ASSIGNMENT", "submission": "SUBMISSION_TAG",
    "commit": "COMMIT_URL", "release": "RELEASE_URL",
}  # fmt: skip


@dataclass(frozen=True)
class Check:
    """points: those earned; worth: at most."""

    check: str
    points: float
    worth: float
    visible: bool
    message: str
    seconds: float


def variant_of(file: Path) -> str:
    """The seed of a submission's random inputs, from its name."""
    return hashlib.sha256(file.name.encode()).hexdigest()[:12]


def grade(file: Path, number: int) -> list[Check]:
    """Run the checks of a lab on a file. LabError if there is no such lab or file."""
    lab_file(number)
    if not file.is_file():
        raise LabError(f"no submission {file}")
    command = [
        sys.executable, "-m", "pytest", str(FOLDER / "checks" / f"lab{number}"), "-q", "-p",
        "no:cacheprovider", "-p", "labs.report", "--submission", str(file.resolve()), "--variant",
        variant_of(file),
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False
        )
    except subprocess.TimeoutExpired:
        message = f"the checks took longer than {PATIENCE:g} s"
        return [Check("all", 0.0, 1.0, True, message, PATIENCE)]
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"check"')]
    if done.returncode > 1 or not lines:
        raise LabError(f"the checks of lab {number} did not run: {done.stdout[-300:]}")
    return [Check(**json.loads(line)) for line in lines]


def summary(checks: list[Check]) -> dict[str, Any]:
    return {
        "points": sum(one.points for one in checks),
        "of": sum(one.worth for one in checks),
        "checks": [asdict(one) for one in checks],
    }


def for_gradescope(checks: list[Check]) -> dict[str, Any]:
    """results.json of Gradescope's autograder."""
    return {
        "tests": [
            {
                "name": one.check, "score": one.points, "max_score": one.worth,
                "output": one.message, "visibility": "visible" if one.visible else "hidden",
            }
            for one in checks
        ]
    }  # fmt: skip


def for_classroom50(checks: list[Check]) -> dict[str, Any]:
    """result.json of Classroom 50's autograder, whose runner states what is graded in the
    environment. LabError without it."""
    try:
        graded = {field: os.environ[name] for field, name in OF_RUNNER.items()}
    except KeyError as error:
        raise LabError(
            f"format classroom50: the environment variable {error.args[0]} is missing; the runner "
            "of Classroom 50 sets it"
        ) from None
    return {
        "schema": "classroom50/result/v1",
        **graded,
        "review": os.environ.get("REVIEW_URL") or graded["commit"],
        "datetime": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "score": round(sum(one.points for one in checks)),
        "max-score": round(sum(one.worth for one in checks)),
        "tests": [
            {
                "test-name": one.check, "passed": one.points == one.worth,
                "score": round(one.points), "max-score": round(one.worth),
                "message": one.message if one.visible else "",
            }
            for one in checks
        ],
    }  # fmt: skip


# What `--format` writes.
FORMATS: dict[str, Callable[[list[Check]], dict[str, Any]]] = {
    "lab": summary,
    "gradescope": for_gradescope,
    "classroom50": for_classroom50,
}


def grade_all(files: list[Path], number: int, out: Path, at_once: int) -> None:
    """A JSON per submission in a folder, and a table."""
    with ThreadPoolExecutor(at_once) as pool:
        graded = pool.map(lambda file: grade(file, number), files)
        for file, checks in zip(files, graded, strict=True):
            found = summary(checks)
            write_json(out / f"{file.stem}.json", found)
            say(f"{file.name:<40} {found['points']:g} of {found['of']:g}")
