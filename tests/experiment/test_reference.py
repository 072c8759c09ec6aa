"""The committed results."""

import json
import shutil
from pathlib import Path

import pytest

from configs.files import read_sealed
from configs.schema import LabError
from experiment import reference
from experiment.reading import read_config
from experiment.reference import other_configs, write_reference
from experiment.run import Run
from measure.verdicts import claim_of
from tasks import load_task
from tests.helpers import RESULTS, ROOT, edited

LARGE = [pytest.param(name, marks=pytest.mark.slow) for name in ("pronounce", "reason", "text")]


@pytest.mark.parametrize("file", RESULTS, ids=lambda f: f.name)
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


def test_results_are_pooled_only_with_runs_of_the_same_config(tiny_run, tmp_path):
    run = Run.finished(tiny_run)
    other = Path(shutil.copytree(tiny_run, tmp_path / "other"))
    with edited(other / "eval.json") as result:
        result["config"]["students"]["budget"] = 0.5
    with pytest.raises(LabError, match=r"other is a run of another config: students\.budget: 0\.5"):
        write_reference(run, run.config(), [other], tmp_path / "results")


@pytest.mark.parametrize("dirty", [True, False])
def test_a_result_of_uncommitted_code_says_so(dirty, copy, tmp_path, capsys):
    with edited(copy / "eval.json") as result:
        result["environment"]["dirty"] = dirty
        result["environment"]["trained"]["dirty"] = False
    (tmp_path / "README.md").write_text("", "utf-8")
    run = Run.finished(copy)
    write_reference(run, run.config(), [], tmp_path / "results")
    printed = capsys.readouterr().out
    assert ("made with uncommitted code" in printed) == dirty
    assert "no bands written: they need" in printed
    written = json.loads((tmp_path / "results" / "tiny.json").read_text("utf-8"))
    assert written["bands"] is None


def test_the_claims_of_one_run_are_stored_beside_those_of_all(copy, tmp_path, monkeypatch):
    """As many runs as bands need, all with the same figures here."""
    with edited(copy / "eval.json") as result:
        for verdict in result["verdicts"]:
            verdict |= {"result": "one run", "per_seed": [0.5]}
    monkeypatch.setattr(
        reference, "bands", lambda _: {claim_of(v): {"values": [1.0, -1.0, 3.0]} for v in claims}
    )
    claims = read_sealed(copy / "eval.json")["verdicts"]
    (tmp_path / "README.md").write_text("", "utf-8")
    run = Run.finished(copy)
    write_reference(run, run.config(), [], tmp_path / "results")
    written = json.loads((tmp_path / "results" / "tiny.json").read_text("utf-8"))
    expected = {"mean": 1.0, "spread": 2.0, "runs": 3, "ahead": 2, "values": [1.0, -1.0, 3.0]}
    assert [v["committed"] for v in written["verdicts"]] == [expected] * len(claims) != []
