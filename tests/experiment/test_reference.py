"""The committed results."""

import json

import pytest

from experiment.reading import read_config
from experiment.reference import other_configs
from tasks import load_task
from tests.helpers import ROOT

LARGE = [pytest.param(name, marks=pytest.mark.slow) for name in ("pronounce", "reason", "text")]


@pytest.mark.parametrize("file", sorted((ROOT / "results").glob("*.json")), ids=lambda f: f.name)
def test_a_committed_result_belongs_to_its_config(file):
    config = read_config(ROOT / "configs" / f"{file.stem}.yaml")
    stored = json.loads(file.read_text(encoding="utf-8"))["config"]
    assert other_configs(stored, config, ignored=()) == []


@pytest.mark.parametrize("name", ["digits", "trace-float64", *LARGE])
def test_a_committed_result_is_of_the_rows_that_its_task_has_today(name):
    """Other splits would mix words of the training into those of the evaluation."""
    stored = json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))
    task = load_task(read_config(ROOT / "configs" / f"{name}.yaml").task)
    assert task.rows("train").digest() == stored["artifacts"]["rows"]
    assert {split: task.rows(split).digest() for split in stored["rows"]} == stored["rows"]


def test_a_committed_result_names_no_place_of_one_machine():
    from experiment.environment import without_places

    arguments = ["eval.py", "/somewhere/runs/digits", "runs/digits", "name=a/b", "--update"]
    expected = ["eval.py", "digits", "runs/digits", "name=a/b", "--update"]
    assert without_places(arguments) == expected
    for file in (ROOT / "results").glob("*.json"):
        text = file.read_text(encoding="utf-8")
        assert not any(place in text for place in ('"/', " /tmp", " /home", " /root")), file.name
