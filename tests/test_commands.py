"""Every command in the README and in docs/ works as printed: executed on the tiny run, or, where it
trains for minutes, read and checked with the config that it names."""

import re
import shlex
import shutil

import pytest

import eval as judge
from experiment.command import train_parser
from experiment.plan import Plan
from experiment.reading import read_config
from experiment.reference import write_reference
from experiment.run import Run
from measure import extraction
from measure.report.documents import pages
from teacher.api import __main__ as api
from teacher.watermark import write_key
from tests.helpers import ROOT

BLOCKS = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_EXECUTED = {  # why not
    "python3 -m venv .venv": "sets up an environment, as `make test` did",
    '.venv/bin/python -m pip install -c constraints.txt -e ".[test]"': "the same",
    ".venv/bin/python -m pip install -c constraints.txt torch --index-url "
    "https://download.pytorch.org/whl/cpu": "needs the index of PyTorch",
    ".venv/bin/python -m experiment.install": "tests/experiment/test_install.py does, offline",
    ".venv/bin/python -m pytest": "this is it",
    "python -m experiment.vocabulary configs/stories.yaml --rows 300 --out stories.tokens": (
        "tests/tasks/test_instruct.py does, with a smaller teacher"
    ),
    "accelerate launch --multi_gpu --num_processes 2 train.py configs/quickstart.yaml workers=1 "
    "name=shared": "tests/experiment/test_processes.py launches two processes on a smaller config",
}


def commands() -> list[str]:
    """The lines of the pages' code blocks that a reader can type, without comments."""
    found = []
    for page in pages(ROOT):
        for language, block in BLOCKS.findall(page.read_text(encoding="utf-8")):
            if language:
                continue
            lines = [line.partition("  #")[0].strip() for line in block.splitlines()]
            programs = ("python", ".venv/", "make ", "accelerate ")
            found += [line for line in lines if line.startswith(programs)]
    return list(dict.fromkeys(found))


def arguments_of(script: str) -> list[list[str]]:
    """The arguments of all commands that call this script."""
    pattern = rf"(?:\.venv/bin/)?python {script} (.*)"
    return [shlex.split(match[1]) for line in commands() if (match := re.fullmatch(pattern, line))]


def test_every_command_is_executed_or_has_a_reason_why_not():
    known = [
        r"(\.venv/bin/)?python (train|eval)\.py .*", r"make \w+", r"python -m teacher\.api .*",
        r"python -m measure\.extraction .*",
    ]  # fmt: skip
    others = [c for c in commands() if not any(re.fullmatch(one, c) for one in known)]
    assert sorted(others) == sorted(NOT_EXECUTED)


def test_make_knows_every_target():
    targets = [line.split()[1] for line in commands() if line.startswith("make ")]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert len(targets) >= 3
    assert [target for target in targets if f"\n{target}:" not in makefile] == []


@pytest.mark.parametrize("arguments", arguments_of("-m teacher.api"), ids=" ".join)
def test_a_command_of_the_api_is_understood(arguments):
    """What each does: tests/teacher/api/test_api_command.py."""
    assert api.parser().parse_args(arguments).do


@pytest.mark.parametrize("arguments", arguments_of("-m measure.extraction"), ids=" ".join)
def test_a_command_that_detects_is_understood(arguments):
    """tests/measure/test_extraction.py executes it."""
    assert extraction.parser().parse_args(arguments).log


@pytest.mark.parametrize("arguments", arguments_of("train.py"), ids=" ".join)
def test_a_command_that_trains_names_a_config_that_can_be_trained(arguments):
    options = train_parser().parse_intermixed_args(arguments)
    config = read_config(ROOT / options.config, options.overrides)  # with its plan and budgets
    assert Plan(config).evaluated


@pytest.mark.parametrize("arguments", arguments_of("eval.py"), ids=" ".join)
def test_a_command_that_evaluates_works(arguments, tiny_run, tmp_path, monkeypatch, capsys):
    results = tmp_path / "results"
    results.mkdir()
    monkeypatch.setattr(judge, "RESULTS", results)
    (tmp_path / "README.md").write_text("", encoding="utf-8")
    run = shutil.copytree(tiny_run, tmp_path / "runs" / "tiny")
    if "--check" in arguments:
        write_reference(Run.finished(run), Run.finished(run).config(), [], results)
    if "--key" in arguments:
        write_key(tmp_path / "mark.json")
    names = {"runs/mark.json": str(tmp_path / "mark.json")}
    on_tiny = [
        names.get(argument, str(run) if argument.startswith("runs/") else argument)
        for argument in arguments
    ]
    assert judge.main(on_tiny) == 0
    assert capsys.readouterr().out
