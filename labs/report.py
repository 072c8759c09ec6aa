"""A pytest plugin for the grader: a line of JSON for each check."""

import json
import sys
from collections.abc import Generator

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    worth = next((float(mark.args[0]) for mark in item.iter_markers("points")), 1.0)
    if report.when == "call" or (report.when == "setup" and report.failed):
        line = {
            "check": item.name, "points": worth if report.passed else 0.0, "worth": worth,
            "visible": not any(item.iter_markers("hidden")),
            "message": "" if report.passed else message_of(call),
            "seconds": round(call.duration, 3),
        }  # fmt: skip
        print("\n" + json.dumps(line), file=sys.__stdout__, flush=True)
    return report


def message_of(call: pytest.CallInfo) -> str:
    """What a failed check says, without the expression that pytest adds."""
    return str(call.excinfo.value).split("\nassert ")[0][:1000] if call.excinfo else ""
