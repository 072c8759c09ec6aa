"""The committed results."""

import json

import pytest

from experiment.reading import read_config
from experiment.reference import other_configs
from tests.helpers import ROOT


@pytest.mark.parametrize("file", sorted((ROOT / "results").glob("*.json")), ids=lambda f: f.name)
def test_a_committed_result_belongs_to_its_config(file):
    config = read_config(ROOT / "configs" / f"{file.stem}.yaml")
    stored = json.loads(file.read_text(encoding="utf-8"))["config"]
    assert other_configs(stored, config, ignored=()) == []


def test_a_committed_result_names_no_place_of_one_machine():
    from experiment.environment import without_places

    arguments = ["eval.py", "/somewhere/runs/digits", "runs/digits", "name=a/b", "--update"]
    expected = ["eval.py", "digits", "runs/digits", "name=a/b", "--update"]
    assert without_places(arguments) == expected
    for file in (ROOT / "results").glob("*.json"):
        text = file.read_text(encoding="utf-8")
        assert not any(place in text for place in ('"/', " /tmp", " /home", " /root")), file.name
