"""Stages: what another run made from the same inputs is copied."""

from dataclasses import replace
from types import SimpleNamespace

from experiment import stages
from experiment.experiment import teacher_made_from
from experiment.reading import read_config
from experiment.run import Run
from experiment.training_state import TrainingState
from tests.helpers import TINY, train_tiny

CHANGED = (
    "seeds=[1]", "controls=[]", "verdicts=[]", "students.budget=0.5",
    "recipes={warm: {access: logits, temperature: 2}}",
)  # fmt: skip


def test_a_changed_recipe_finds_the_teacher_and_the_outputs_of_another_run(copy, capsys):
    assert train_tiny(copy.parent, "name=warm", *CHANGED) == 0
    printed = capsys.readouterr().out
    assert "teacher: copied from" in printed
    assert "outputs/data-logits: copied from" in printed
    first, warm = Run.finished(copy), Run.finished(copy.parent / "warm")
    for stage in ("teacher", "outputs/data-logits"):
        assert warm.manifest["stages"][stage]["sha256"] == first.manifest["stages"][stage]["sha256"]
        assert warm.cost_of(stage)["flops"] == first.cost_of(stage)["flops"]
    assert any(line["stage"] == "teacher" for line in warm.metrics())
    assert train_tiny(copy.parent, "--fresh", "name=fresh", *CHANGED) == 0
    assert "copied from" not in capsys.readouterr().out


def test_another_teacher_is_not_taken_for_this_one(lab):
    """Whatever a teacher depends on changes what it was made from; nothing else does."""

    def made_from(*overrides, seed=0):
        config = read_config(TINY, ["log_every=1", *overrides])
        return teacher_made_from(replace(lab, config=config), seed)

    first = made_from()
    for change in (
        "task.limit=300",
        "teacher.epochs=1",
        "teacher.model.hidden_size=48",
        "teacher.training.learning_rate=0.02",
        "precision=float64",
    ):
        assert made_from(change) != first, change
    assert made_from(seed=1) != first
    for change in ("seeds=[1]", "students.budget=0.5", "name=a", "recipes.distilled.temperature=2"):
        assert made_from(change) == first, change
    other = replace(lab, run=Run(lab.run.folder))
    other.run.manifest["data"] = lab.run.manifest["data"] | {"rows": "others"}
    assert teacher_made_from(other, 0) != first


def test_a_run_says_what_is_done_and_how_long_the_rest_takes(lab, monkeypatch, capsys):
    clock = iter([0.0, 10.0, 300.0])
    monkeypatch.setattr(stages, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(stages, "record_stage", lambda *_: None)
    jobs = {f"student {n}": (lambda *_: None,) for n in range(3)}
    stages.run_stages(lab, jobs)
    assert capsys.readouterr().out.splitlines() == [
        "student 0 is done, 1 of 3; about 20 s left",
        "student 1 is done, 2 of 3; about 2 minutes left",
    ]
    assert stages.duration(89) == "about 89 s"
    assert stages.duration(5399) == "about 90 minutes"
    assert stages.duration(5400) == "about 1.5 h"


def test_progress_is_in_steps_or_where_a_student_writes_itself_in_flops():
    by_flops = SimpleNamespace(flops=5.0, max_flops=20.0, step=3, steps=4)
    assert TrainingState.progress.fget(by_flops) == 0.25
    by_steps = SimpleNamespace(flops=5.0, max_flops=None, step=3, steps=4)
    assert TrainingState.progress.fget(by_steps) == 0.75
