"""The result of a run: what it costs and how fast its models answer."""

import time
from types import SimpleNamespace

import numpy as np
import pytest

from experiment import result
from experiment.plan import Plan
from experiment.reading import read_config
from tests.helpers import TINY


def test_speed_is_the_median_time_of_one_answer_and_the_rate_of_a_batch(monkeypatch):
    clock, seconds = [1000.0], iter([1.0, *[0.004] * 19, 0.5])

    def answer(model, task, rows):
        clock[0] += next(seconds)

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(result, "free_running", answer)
    speed = result.measure_speed(None, None, np.arange(50))
    assert speed["latency_ms"] == pytest.approx(4)
    assert speed["answers_per_second"] == pytest.approx(100)


def costs_by_hand(**of_teacher):
    """A teacher, its outputs and a student, of 100, 10 and 50 units of everything."""
    one = "recipes={free: {access: logits, outputs: {charged: false}}}"
    plan = Plan(read_config(TINY, [one, "seeds=[0]", "controls=[]", "verdicts=[]"]))
    units = {"teacher": 100, "outputs/data-logits": 10, "students/free/seed-0": 50}
    ledger = {
        stage: dict.fromkeys(("flops", "seconds", "joules", "money"), count)
        | {"joules_source": "by hand", "steps": 1}
        for stage, count in units.items()
    }
    ledger["teacher"] |= of_teacher
    stages = {"outputs/data-logits": {"rows": 12}}
    run = SimpleNamespace(cost_of=ledger.get, manifest={"stages": stages}, ledger=[])
    return result.costs(run, plan, SimpleNamespace(shows_reasoning=False), {})


def test_the_cost_of_a_student_includes_outputs_that_its_budget_does_not():
    """`charged: false` gives a student more steps, but the outputs are no cheaper."""
    found = costs_by_hand()
    assert found["fraction_of_teacher"]["flops"] == pytest.approx(0.6)
    assert found["flops_per_student_with_teacher"] == pytest.approx(
        {"1": 1.6, "10": 6.1 / 10, "100": 51.1 / 100}
    )


def test_there_is_no_fraction_of_a_cost_that_is_unknown_or_zero():
    assert set(costs_by_hand(steps=0)["fraction_of_teacher"].values()) == {None}  # pretrained
    free = costs_by_hand(money=0)["fraction_of_teacher"]
    assert (free["money"], free["seconds"]) == (None, pytest.approx(0.6))


def test_test_time_scaling_continues_the_answers_of_the_first_seed(monkeypatch):
    monkeypatch.setattr(
        result, "reasoning", lambda model, task, rows, texts, *_, seed: {"of": texts}
    )
    task = SimpleNamespace(steps={"heldout": [1]})
    references = {name: SimpleNamespace(task=task, rows=None) for name in ("heldout", "long")}
    evaluations = {
        name: [SimpleNamespace(answers=SimpleNamespace(texts=(name, seed))) for seed in range(3)]
        for name in references
    }
    assert result.reasoning_of(None, references, evaluations, True) == {
        "reasoning": {"of": ("heldout", 0), "long": {"of": ("long", 0)}}
    }
