"""Budgets: equal FLOPs for every student, including everything it needs."""

import json
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest

import train
from configs.schema import LabError, Recipe
from experiment import budget
from experiment.budget import affordable_steps, expected_steps, flops_left
from experiment.experiment import loss_of
from experiment.plan import Plan
from models.language import build_model


def test_every_student_and_control_spends_the_budget_and_no_more(tiny_run):
    ledger = {row["stage"]: row for row in json.loads((tiny_run / "ledger.json").read_text())}
    teacher = ledger["teacher"]["flops"]
    outputs = {
        "distilled": "outputs/data-logits",
        "shuffled": "outputs/data-logits",
        "written": "outputs/teacher-text-train",
        "top": "outputs/teacher-top_k-5-train",
        "states": "outputs/teacher-hidden-1-train-300",
        "invented": "outputs/teacher-logits-invented-200",
    }
    for stage, row in ledger.items():
        if stage.startswith("students/"):
            name = stage.split("/")[1]
            spent = row["flops"] + (ledger[outputs[name]]["flops"] if name in outputs else 0)
            assert 0.55 * teacher < spent <= 0.6 * teacher, stage


def test_every_method_costs_the_same_with_everything_that_it_needs(methods_run):
    """Outputs, what the student writes and the teacher scores, and an assistant's training."""
    config, teacher = methods_run.config(), methods_run.cost_of("teacher")["flops"]
    plan = Plan(config)
    for name, recipe in config.recipes.items():
        spent = methods_run.cost_of(f"students/{name}/seed-0")["flops"]
        before = sum(methods_run.cost_of(stage)["flops"] for stage in plan.prerequisites(recipe))
        budget = recipe.student.budget_fraction * 0.6 * teacher
        # A student that writes starts no step that might overspend, here a tenth of the budget.
        least = 0.85 if recipe.writes_itself else 0.9
        assert least * budget < spent + before <= budget, name
    result = json.loads((methods_run.folder / "eval.json").read_text("utf-8"))
    fractions = result["cost"]["fraction_of_teacher_by_student"]
    assert fractions["assisted"]["flops"] == pytest.approx(0.6, abs=0.03)
    assert fractions["assistant"]["flops"] == pytest.approx(0.3, abs=0.03)


def test_a_budget_that_cannot_work_is_rejected_before_anything_trains(tmp_path, capsys):
    for override in ("students.budget=0.001", "students.budget=0.01"):
        assert train.main(["configs/tiny.yaml", override, "--runs", str(tmp_path)]) == 2
        assert "leaves no FLOPs for training" in capsys.readouterr().err
        assert not (tmp_path / "tiny" / "config.yaml").exists()


def test_the_steps_of_a_student_that_writes_are_estimated_from_what_a_row_costs():
    """A forward pass is a third of a step; the teacher scores each row that the student writes."""

    def score(ids, use_cache):
        teacher.flops += 3 * ids.numel()

    teacher = Mock(side_effect=score, flops=100, device="cpu")
    rows = SimpleNamespace(prompt_lengths=np.array([4, 6]))
    policy = SimpleNamespace(teacher=teacher, share=lambda progress: 0.5, rows=rows, longest=10)
    plain = SimpleNamespace(of_row=lambda length: 12 * length)
    steps, most = expected_steps(plain, policy, np.array([8, 12]), 5, 6000)
    assert most == 2 * (12 * 16 + 12 * 16 / 3 + 3 * 16)
    assert steps == int((6000 - most) / (2 * (12 * 10 + 0.5 * (12 * 10 / 3 + 3 * 10))))
    policy.teacher = None  # rewards cost nothing
    assert expected_steps(plain, policy, np.array([8, 12]), 5, 6000)[1] == 2 * (12 * 16 * 4 / 3)


def test_a_budget_that_the_outputs_exceed_affords_no_step():
    flops = SimpleNamespace(of_batch=lambda lengths: 10)

    def steps(most):
        order, hidden = (lambda step: np.array([0])), (lambda steps: 0)
        return affordable_steps(flops, flops, np.array([5]), order, most, hidden)

    assert [steps(most) for most in (-1, 9, 35)] == [0, 0, 3]


def test_a_budget_is_what_is_left_after_outputs_and_an_assistant():
    costs = {"teacher": 1000.0, "outputs/a": 30.0, "students/b/seed-0": 50.0}
    students = SimpleNamespace(budget=0.2, tflops=None)
    experiment = SimpleNamespace(
        config=SimpleNamespace(students=students),
        run=SimpleNamespace(cost_of=lambda stage: {"flops": costs[stage]}),
        plan=SimpleNamespace(prerequisites=lambda recipe: ["outputs/a", "students/b/seed-0"]),
    )
    whole, half = Recipe(), Recipe(student={"budget_fraction": 0.5})
    assert flops_left(experiment, whole) == pytest.approx(0.2 * 1000 - 30 - 50)
    assert flops_left(experiment, half) == pytest.approx(0.5 * 0.2 * 1000 - 30 - 50)
    students.tflops = 1e-9
    assert flops_left(experiment, whole) == pytest.approx(1000 - 30 - 50)


def test_what_the_estimate_let_pass_is_refused_before_its_student_trains(lab, monkeypatch):
    """Outputs may cost more than the estimate from shapes said."""
    monkeypatch.setattr(budget, "flops_left", lambda *_: 1.0)
    recipe = lab.config.recipes["distilled"]
    model = build_model(lab.config.students.model, lab.task)
    data = train.teacher_training_set(lab, 0)
    loss = loss_of(lab, recipe, lab.config.students.training)
    with pytest.raises(LabError, match=r"distilled: students\.budget 0\.6 leaves no FLOPs"):
        budget.steps_within_budget(lab, "distilled", recipe, model, data, loss)
