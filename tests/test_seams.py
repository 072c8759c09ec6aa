"""Adding a task, an objective, an access level or a metric touches one file and one table entry:
here that file is CONTRIBUTING.md, and the whole story runs with all four."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import eval as judge
import tasks
import train
from experiment.experiment import data_of, open_experiment, teacher_made_from
from experiment.reading import read_config
from experiment.run import Run
from measure import metrics
from measure.metrics import METRICS
from student import objectives
from student.objectives import OBJECTIVES
from tasks import TASKS, pronounce
from tasks.pronounce import Pronounce
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
def story(tmp_path_factory):
    """The code of CONTRIBUTING.md, then train, evaluate, ask and self-check with it: the folder,
    eval.json, the report and what was printed."""
    tables = (TASKS, OBJECTIVES, ACCESS, METRICS)
    before = [dict(table) for table in tables]
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    rooms = ({**vars(pronounce), **vars(tasks)}, vars(objectives), vars(access), vars(metrics))
    for block, room in zip(blocks, rooms, strict=True):
        assert len([line for line in block.splitlines() if line.strip()]) <= 10
        exec(block, dict(room))
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


def test_a_task_is_one_class_and_one_entry(story):
    assert set(story.result["students"]["taught"]["quality"]) == {"length_error"}
    assert "long" not in story.result["teacher"]
    assert "length error, phonemes" in story.report
    assert "Results on held-out words" in story.report
    assert story.result["verdicts"][0]["metric"] == "length_error"


def test_an_objective_is_one_function_and_one_entry(story):
    assert story.result["students"]["taught"]["recipe"]["objective"]["brier"] == 0.9


def test_an_access_level_is_one_entry(story):
    assert (story.run / "outputs" / "data-rounded").is_dir()
    assert story.result["students"]["taught"]["recipe"]["access"] == "rounded"


def test_a_metric_is_one_entry_with_heading_unit_and_direction(story):
    found = {**story.result["students"], **story.result["controls"]}
    taught, baseline = (
        found[name]["fidelity"]["confidence"]["mean"] for name in ("taught", "baseline")
    )
    difference = story.result["verdicts"][1]["difference"]
    assert difference == pytest.approx(baseline - taught)  # lower wins
    assert "mean confidence %" in story.report


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("recipes.distilled.access=logit", "no access 'logit'; did you mean 'logits'?"),
        ("recipes.distilled.objective={forward_kl: 0.5, brier: 0.5}", "no objective 'brier'"),
        ("verdicts=[{claim: distilled beats baseline, metric: kl}]", "has no metric 'kl'"),
        ("task.name=pronunce", "no task 'pronunce'; did you mean 'pronounce'?"),
        ("task.limt=600", "unknown key 'task.limt'; did you mean 'limit'?"),
    ],
)
def test_a_name_that_no_table_has_is_an_error(override, expected, tmp_path, capsys):
    assert train.main(["configs/tiny.yaml", override, "--runs", str(tmp_path)]) == 2
    assert expected in capsys.readouterr().err


# -- the plan --------------------------------------------------------------------------------------


def test_a_budget_that_cannot_work_is_rejected_before_anything_trains(tmp_path, capsys):
    for budget in ("students.budget=0.001", "students.budget=0.01"):
        assert train.main(["configs/tiny.yaml", budget, "--runs", str(tmp_path)]) == 2
        assert "leaves no FLOPs for training" in capsys.readouterr().err
        assert not (tmp_path / "tiny" / "config.yaml").exists()


def test_a_changed_recipe_finds_the_teacher_and_the_outputs_of_another_run(tmp_path, capsys):
    config = tmp_path / "seams.yaml"
    config.write_text(json.dumps(CONFIG), encoding="utf-8")
    runs = ["--runs", str(tmp_path)]
    assert train.main([str(config), *runs]) == 0
    capsys.readouterr()
    changed = ["name=warm", "recipes.plain.temperature=2", "seeds=[1]", "students.budget=0.7"]
    assert train.main([str(config), *changed, *runs]) == 0
    printed = capsys.readouterr().out
    assert "teacher: copied from" in printed
    assert "outputs/data-logits: copied from" in printed
    first, warm = Run.finished(tmp_path / "seams"), Run.finished(tmp_path / "warm")
    for stage in ("teacher", "outputs/data-logits"):
        assert warm.manifest["stages"][stage]["sha256"] == first.manifest["stages"][stage]["sha256"]
        assert warm.cost_of(stage)["flops"] == first.cost_of(stage)["flops"]
    assert any(line["stage"] == "teacher" for line in warm.metrics())
    assert train.main([str(config), "--fresh", "name=fresh", *runs]) == 0
    assert "copied from" not in capsys.readouterr().out


def test_another_teacher_is_not_taken_for_this_one(tmp_path):
    """Whatever a teacher depends on changes what it was made from; nothing else does."""
    file = tmp_path / "seams.yaml"
    file.write_text(json.dumps(CONFIG), encoding="utf-8")

    def made_from(*overrides, seed=0):
        experiment = open_experiment(read_config(file, list(overrides)), Run(tmp_path))
        experiment.run.manifest["data"] = data_of(experiment)
        return teacher_made_from(experiment, seed)

    first = made_from()
    for change in (
        "task.limit=200",
        "teacher.epochs=1",
        "teacher.model.hidden_size=32",
        "teacher.training.learning_rate=0.02",
        "precision=float64",
    ):
        assert made_from(change) != first, change
    assert made_from(seed=1) != first
    for change in ("seeds=[1]", "students.budget=0.5", "name=other", "recipes.plain.temperature=2"):
        assert made_from(change) == first, change
    assert made_from("teacher.seed=1", seed=0) == first  # a second teacher of another run


def test_a_batch_of_other_rows_never_gets_these_outputs(tiny_run):
    from models.rows import collate
    from teacher.shards import Outputs

    outputs = Outputs(tiny_run / "outputs" / "data-logits")
    other = Pronounce(limit=300).rows("train")
    with pytest.raises(ValueError, match="not built from the rows"):
        outputs.signal(collate(other, np.arange(5), 0))
    shuffled = outputs.shuffled(0)
    assert np.array_equal(outputs.source, np.arange(len(outputs.rows)))  # unchanged
    assert not np.array_equal(shuffled.source, outputs.source[: len(shuffled.rows)])
