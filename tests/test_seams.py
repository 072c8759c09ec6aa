"""Adding a task, an objective, an access level or a metric takes one file and one table entry:
here that file is docs/extending.md, and the whole pipeline runs with all four."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

import eval as judge
import tasks
import train
from measure import metrics
from measure.metrics import METRICS
from student import objectives
from student.objectives import OBJECTIVES
from tasks import TASKS, pronounce
from teacher import access
from teacher.access import ACCESS

ROOT = Path(__file__).parent.parent
MODEL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "initializer_range": 0.2,
}
LEARNER = {"model": MODEL, "training": {"batch_rows": 32, "learning_rate": 0.01}}
CONFIG = {
    "name": "seams",
    "task": {"name": "pronounce", "limit": 300},
    "seeds": [0],
    "threads": 1,
    "teacher": {**LEARNER, "epochs": 2},
    "students": {**LEARNER, "budget": 0.8},
    "recipes": {"plain": {"access": "logits"}},
    "controls": ["baseline"],
    "log_every": 5,
}
WITH_ALL_FOUR = {
    "task": {"name": "word_length", "limit": 300},
    "recipes": {
        "taught": {
            "access": "rounded",
            "objective": {"brier": 0.9, "cross_entropy": 0.1},
            "temperature": 2,
        }
    },
    "controls": ["baseline", "smoothed"],
    "verdicts": [
        {"claim": "taught beats baseline", "metric": "length_error"},
        {"claim": "taught beats baseline", "metric": "confidence"},
    ],
}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """The code of docs/extending.md, then train, evaluate, ask and self-check with it: the folder,
    eval.json and the report."""
    tables = (TASKS, OBJECTIVES, ACCESS, METRICS)
    before = [dict(table) for table in tables]
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    namespaces = (
        {**vars(pronounce), "TASKS": tasks.TASKS},
        vars(objectives),
        vars(access),
        vars(metrics),
    )
    for block, namespace in zip(blocks, namespaces, strict=True):
        assert len([line for line in block.splitlines() if line.strip()]) <= 10
        exec(block, dict(namespace))
    folder = tmp_path_factory.mktemp("seams")
    config = folder / "seams.yaml"
    config.write_text(json.dumps({**CONFIG, **WITH_ALL_FOUR}), encoding="utf-8")
    run = folder / "seams"
    assert train.main([str(config), "--runs", str(folder)]) == 0
    assert judge.main([str(run)]) == 0
    assert judge.main([str(run), "--ask", "lab"]) == 0
    assert judge.main([str(run), "--selfcheck"]) == 0
    result = json.loads((run / "eval.json").read_text("utf-8"))
    yield SimpleNamespace(
        run=run, result=result, report=(run / "report.html").read_text(encoding="utf-8")
    )
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


def test_a_task_is_one_class_and_one_entry(outcome):
    assert set(outcome.result["students"]["taught"]["quality"]) == {"length_error"}
    assert "long" not in outcome.result["teacher"]
    assert "length error, phonemes" in outcome.report
    assert "<caption>held-out words</caption>" in outcome.report
    assert "<dt>access rounded</dt><dd>reveals rounded numbers</dd>" in outcome.report
    assert "<dt>mean confidence</dt>" in outcome.report
    assert outcome.result["verdicts"][0]["metric"] == "length_error"


def test_an_objective_is_one_function_and_one_entry(outcome):
    assert outcome.result["students"]["taught"]["recipe"]["objective"]["brier"] == 0.9


def test_an_access_level_is_one_entry(outcome):
    assert (outcome.run / "outputs" / "data-rounded").is_dir()
    assert outcome.result["students"]["taught"]["recipe"]["access"] == "rounded"


def test_a_metric_is_one_entry_with_heading_unit_and_direction(outcome):
    found = {**outcome.result["students"], **outcome.result["controls"]}
    taught, baseline = (
        found[name]["fidelity"]["confidence"]["mean"] for name in ("taught", "baseline")
    )
    difference = outcome.result["verdicts"][1]["difference"]
    assert difference == pytest.approx(baseline - taught)  # lower wins
    assert "mean confidence %" in outcome.report


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("recipes.distilled.access=logit", "no access 'logit'; did you mean 'logits'?"),
        ("recipes.distilled.objective={forward_kl: 0.5, huber: 0.5}", "no objective 'huber'"),
        ("verdicts=[{claim: distilled beats baseline, metric: kl}]", "has no metric 'kl'"),
        ("task.name=pronunce", "no task 'pronunce'; did you mean 'pronounce'?"),
        ("task.limt=600", "unknown key 'task.limt'; did you mean 'limit'?"),
    ],
)
def test_a_name_that_no_table_has_is_an_error(override, expected, tmp_path, capsys):
    assert train.main(["configs/tiny.yaml", override, "--runs", str(tmp_path)]) == 2
    assert expected in capsys.readouterr().err


# -- the plan --------------------------------------------------------------------------------------
