"""The checks of the labs: of the solutions or, with --mine, of the learner's own functions.

pytest labs/checks/lab1 --mine            # your functions, in mine/lab1.py
pytest labs/checks/lab1 --submission FILE # somebody's, in a process with limits
"""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from labs.sandbox import Limits
from labs.source import MINE, lab_file
from labs.submission import Local, Remote, SubmissionError, one_thread

SECONDS = 20.0  # of each call


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--mine", action="store_true", help="check your own functions, in mine/")
    parser.addoption("--submission", type=Path, help="check a file, in a process with limits")
    parser.addoption("--variant", default="0", help="seed of the checks' random inputs")


def pytest_configure(config: pytest.Config) -> None:
    one_thread()


@pytest.fixture(scope="module")
def lab(request: pytest.FixtureRequest) -> Iterator[Local | Remote]:
    """The functions to check. A file that cannot be imported fails all checks, in one line."""
    number = int(re.search(r"lab(\d+)", request.module.__name__)[1])
    submission = request.config.getoption("--submission")
    try:
        if submission:
            found = Remote(submission, Limits(SECONDS))
        elif request.config.getoption("--mine"):
            found = Local(mine(number))
        else:
            found = Local(lab_file(number))
    except SubmissionError as error:
        pytest.fail(str(error), pytrace=False)
    yield found
    found.close()


def mine(number: int) -> Path:
    file = MINE / f"lab{number}.py"
    if not file.is_file():
        pytest.fail(f"no {file}: python -m labs start {number} writes it", pytrace=False)
    return file


@pytest.fixture
def draw(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random inputs of a check: others for every variant and check."""
    variant = request.config.getoption("--variant")
    digest = np.frombuffer(f"{variant} {request.node.name}".encode(), np.uint8)
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(digest.tolist())))


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    """What a learner's function raises is a failed check, without a traceback of the checks."""
    try:
        return (yield)
    except SubmissionError as error:
        pytest.fail(str(error), pytrace=False)
