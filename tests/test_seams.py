"""Adding a task, an objective, an access level or a metric touches its own file and one table
entry: here that file is this one, and the whole story runs with it."""

import json

import numpy as np
import pytest

import eval as judge
import train
from experiment.run import Run
from measure.metrics import METRICS
from student.objectives import OBJECTIVES, Objective
from tasks import TASKS
from tasks.pronounce import Pronounce
from tasks.task import Metric
from teacher.access import ACCESS, DISTRIBUTION, LOG_PROBS, Access, compare_all, read_all, store_all
from teacher.signal import Signal

MODEL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "initializer_range": 0.2,
}
CONFIG = {
    "name": "seams",
    "task": {"name": "pronounce", "limit": 400},
    "seeds": [0],
    "threads": 1,
    "teacher": {
        "model": MODEL,
        "training": {"batch_rows": 32, "learning_rate": 0.01},
        "epochs": 2,
    },
    "students": {
        "model": MODEL,
        "training": {"batch_rows": 32, "learning_rate": 0.01},
        "budget": 0.8,
    },
    "recipes": {"plain": {"access": "logits"}},
    "controls": ["baseline"],
    "log_every": 5,
}


def whole_story(tmp_path, capsys, question, **changed):
    """Train, evaluate, ask, self-check; returns eval.json and the report."""
    config = tmp_path / "seams.yaml"
    config.write_text(json.dumps({**CONFIG, **changed}), encoding="utf-8")
    assert train.main([str(config), "--runs", str(tmp_path)]) == 0
    run = str(tmp_path / "seams")
    assert judge.main([run]) == 0
    assert judge.main([run, "--ask", question]) == 0
    capsys.readouterr()
    assert judge.main([run, "--selfcheck"]) == 0, capsys.readouterr().out
    report = (tmp_path / "seams" / "report.html").read_text("utf-8")
    return json.loads((tmp_path / "seams" / "eval.json").read_text("utf-8")), report


class Spelling(Pronounce):
    """A task of this file: how many letters of a word's pronunciation come out right."""

    name = "spelling"
    item_noun = "spellings"
    evaluation_splits = ("heldout",)
    metrics = {"misses": Metric("misses", "phonemes", True, "missed")}
    headline = "misses"
    table = ("misses", "kl_teacher_student")

    def grade(self, ids, answers):
        return {"missed": np.array([abs(len(a.split()) - 5) for a in answers], float)}


def test_a_task_is_one_class_and_one_entry(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(TASKS, "spelling", Spelling)
    claims = [{"claim": "plain beats baseline", "metric": "misses"}]
    task = {"name": "spelling", "limit": 400}
    result, report = whole_story(tmp_path, capsys, "lab", task=task, verdicts=claims)
    assert set(result["students"]["plain"]["quality"]) == {"misses"}
    assert "long" not in result["teacher"]
    assert "misses, phonemes" in report
    assert "Results on held-out spellings" in report
    assert result["verdicts"][0]["metric"] == "misses"


def squared_error(student_logits, signal, temperature=1.0):
    teacher, student = signal.outcomes(student_logits, temperature)
    return temperature**2 * (teacher.exp() - student.exp()).square().sum(-1)


def test_an_objective_is_one_function_and_one_entry(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "brier", Objective(squared_error, "outcomes", order=2))
    recipes = {"brier": {"access": "logits", "objective": {"brier": 0.9, "cross_entropy": 0.1}}}
    result, _ = whole_story(tmp_path, capsys, "lab", recipes=recipes)
    assert result["students"]["brier"]["recipe"]["objective"]["brier"] == 0.9


def test_an_access_level_is_one_entry(tmp_path, capsys, monkeypatch):
    """A teacher that rounds its log-probabilities to halves."""

    def reveal(log_probs, targets, k, generator):
        return Signal(targets, (2 * log_probs).round() / 2)

    def compare(signal, live, k):
        return compare_all(signal, (2 * live).round() / 2, k)

    rounded = Access(DISTRIBUTION, reveal, store_all, read_all, LOG_PROBS, compare)
    monkeypatch.setitem(ACCESS, "rounded", rounded)
    recipes = {"rounded": {"access": "rounded", "temperature": 2}}
    controls = ["baseline", "smoothed"]
    result, _ = whole_story(tmp_path, capsys, "lab", recipes=recipes, controls=controls)
    outputs = tmp_path / "seams" / "outputs" / "data-rounded"
    assert outputs.is_dir()
    assert result["students"]["rounded"]["recipe"]["access"] == "rounded"


def confidence(at):
    return at.student.max(-1).values.exp()


def test_a_metric_is_one_entry_with_heading_unit_and_direction(tmp_path, capsys, monkeypatch):
    mean = Metric("mean confidence", "%", True, positions=confidence)
    monkeypatch.setitem(METRICS, "confidence", mean)
    claims = [{"claim": "plain beats baseline", "metric": "confidence"}]
    result, report = whole_story(tmp_path, capsys, "lab", verdicts=claims)
    values = [
        result[group][name]["fidelity"]["confidence"]["mean"]
        for group, name in (("students", "plain"), ("controls", "baseline"))
    ]
    assert result["verdicts"][0]["difference"] == pytest.approx(values[1] - values[0])  # lower wins
    assert "mean confidence %" in report


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
    assert judge.main([str(warm.folder)]) == 0


@pytest.mark.parametrize("change", ["teacher.seed=1", "teacher.epochs=1", "task.limit=300"])
def test_another_teacher_is_not_taken_for_this_one(change, tmp_path, capsys):
    config = tmp_path / "seams.yaml"
    config.write_text(json.dumps({**CONFIG, "controls": ["baseline"]}), encoding="utf-8")
    runs = ["--runs", str(tmp_path)]
    assert train.main([str(config), *runs]) == 0
    assert train.main([str(config), change, "name=other", *runs]) == 0
    assert "copied from" not in capsys.readouterr().out
    fresh = [str(config), "--fresh", "name=fresh", *runs]
    assert train.main(fresh) == 0
    assert "copied from" not in capsys.readouterr().out


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
