"""Budgets: equal FLOPs for every student, including everything it needs."""

import json

import pytest

import train
from experiment.plan import Plan


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
    for budget in ("students.budget=0.001", "students.budget=0.01"):
        assert train.main(["configs/tiny.yaml", budget, "--runs", str(tmp_path)]) == 2
        assert "leaves no FLOPs for training" in capsys.readouterr().err
        assert not (tmp_path / "tiny" / "config.yaml").exists()
