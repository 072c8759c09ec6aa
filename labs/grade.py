"""Grade submissions: one JSON each, in the formats of the services that courses use.

The checks run here, and only call the submission's functions, in a process of its own.
"""

import hashlib
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from configs.files import say, write_json
from configs.schema import LabError
from labs.source import FOLDER, lab_file

PATIENCE = 300.0  # seconds for all checks of a submission
ROOT = FOLDER.parent


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


def grade_all(files: list[Path], number: int, out: Path, at_once: int) -> None:
    """A JSON per submission in a folder, and a table."""
    with ThreadPoolExecutor(at_once) as pool:
        graded = pool.map(lambda file: grade(file, number), files)
        for file, checks in zip(files, graded, strict=True):
            found = summary(checks)
            write_json(out / f"{file.stem}.json", found)
            say(f"{file.name:<40} {found['points']:g} of {found['of']:g}")
