"""Savings: which fraction of the baseline's cost another student needs."""

import math

import numpy as np
import pytest

from measure.report.sentences import rows_line
from measure.report.tables import bought_tables, savings_tables
from measure.savings import COSTS, bought, savings
from measure.statistics import Estimate
from tests.helpers import drawn

BUDGETS = (0.25, 0.5, 1.0)


def students():
    """Three curves of three budgets, and a student of no curve."""
    recipe = {"access": "none", "sequences": "data", "temperature": 1.0}
    recipe["outputs"] = {"transfer_rows": None}
    made = {}
    for kind in ("baseline", "text", "logits"):
        for budget in BUDGETS:
            entry = {**recipe, "access": "none" if kind == "baseline" else kind}
            entry["student"] = {"budget_fraction": budget, "learning_rate": 0.01 / budget}
            made[f"{kind}_{round(100 * budget)}"] = {"recipe": entry, "steps": [10], "rows": 90}
    other = {**recipe, "temperature": 2.0, "student": {"budget_fraction": 1, "learning_rate": 0.1}}
    return made | {"other": {"recipe": other, "steps": [10], "rows": 90}}


def result():
    """Cost is 8 % of the teacher's FLOPs per unit of budget, and twice that of its seconds."""
    made = students()
    costs = {
        name: {
            "flops": 0.08 * entry["recipe"]["student"]["budget_fraction"],
            "seconds": 0.16 * entry["recipe"]["student"]["budget_fraction"] ** 2,
            "money": 0.1,
        }
        for name, entry in made.items()
    }
    stored = {name: {"rows": 50} for name in made if name.startswith(("text", "logits"))}
    return {
        "students": made,
        "config": {
            "students": {"training": {"batch_rows": 4}},
            "task": {"name": "pronounce"},
        },
        "cost": {"fraction_of_teacher_by_student": costs, "outputs_by_student": stored},
    }


def exactly(value):
    return Estimate(np.full(3, value), np.zeros((3, 5)))


def errors(**curves):
    """{student: {"word_error_rate": estimate}} from a value for each budget of each curve."""
    return {
        f"{kind}_{round(100 * budget)}": {"word_error_rate": exactly(value)}
        for kind, values in curves.items()
        for budget, value in zip(BUDGETS, values, strict=True)
    }


def test_curves_are_students_that_differ_only_in_budget_and_in_what_was_tuned():
    found = savings(
        result(), errors(**dict.fromkeys(("baseline", "text", "logits"), (3, 2, 1))), {}
    )
    assert found["curves"] == {
        kind: {f"{kind}_25": 0.25, f"{kind}_50": 0.5, f"{kind}_100": 1.0}
        for kind in ("baseline", "text", "logits")
    }


def test_the_cost_at_the_same_quality_is_interpolated_between_two_budgets():
    """text reaches 0.5 in the middle (of logarithms) of its last two budgets."""
    estimates = errors(baseline=(0.7, 0.5, 0.35), text=(0.8, 0.6, 0.4), logits=(0.3, 0.25, 0.2))
    found = savings(result(), estimates, {"word_error_rate": -1})
    needs = found["needs"]["word_error_rate"]
    at_half = needs["baseline_50"]["text"]
    assert at_half["flops"]["ratio"] == pytest.approx(math.sqrt(0.5 * 1.0) / 0.5)
    assert at_half["seconds"]["ratio"] == pytest.approx(math.sqrt(0.25 * 1.0) / 0.25)
    assert at_half["flops"]["ci95"] == pytest.approx([at_half["flops"]["ratio"]] * 2)
    assert needs["baseline_25"]["text"]["flops"]["ratio"] == pytest.approx(2**0.5)
    assert needs["baseline_100"]["text"] == "more"
    assert {needs[name]["logits"] for name in needs} == {"less"}
    assert set(at_half) == set(COSTS)


def test_the_direction_of_the_metric_counts():
    estimates = errors(baseline=(0.3, 0.5, 0.65), text=(0.2, 0.4, 0.6), logits=(0.7, 0.75, 0.8))
    needs = savings(result(), estimates, {"word_error_rate": 1})["needs"]["word_error_rate"]
    assert needs["baseline_50"]["text"]["flops"]["ratio"] == pytest.approx(math.sqrt(0.5) / 0.5)
    assert needs["baseline_100"]["text"] == "more"
    assert needs["baseline_25"]["logits"] == "less"


@pytest.mark.parametrize(
    ("last", "known"), [((0.47, 0.49, 0.48), True), ((0.47, 0.52, 0.5), False)]
)
def test_budgets_that_differ_too_little_are_not_interpolated(last, known):
    estimates = errors(baseline=(0.7, 0.5, 0.35), text=(0.8, 0.6, 0.4), logits=(0.8, 0.52, 0.4))
    estimates["logits_100"] = {"word_error_rate": Estimate(np.array(last), np.zeros((3, 5)))}
    needs = savings(result(), estimates, {"word_error_rate": -1})["needs"]["word_error_rate"]
    assert (needs["baseline_50"]["logits"] != "unclear") == known


def test_the_interval_covers_the_true_ratio_in_95_of_100_simulated_studies():
    generator, covered, runs = np.random.default_rng(0), 0, 400
    for _ in range(runs):
        row = 0.3 * generator.standard_normal(300)
        levels = {"baseline": (0.7, 0.5, 0.3), "text": (0.8, 0.6, 0.4), "logits": (0.7, 0.5, 0.3)}
        estimates = {
            f"{kind}_{round(100 * budget)}": {
                "word_error_rate": drawn(generator, 5, 300, value, 0.01, row=row)
            }
            for kind, values in levels.items()
            for budget, value in zip(BUDGETS, values, strict=True)
        }
        needs = savings(result(), estimates, {"word_error_rate": -1})["needs"]
        low, high = needs["word_error_rate"]["baseline_50"]["text"]["flops"]["ci95"]
        covered += low <= 2**0.5 <= high
    assert 0.92 <= covered / runs <= 0.99


def test_labels_are_counted_as_different_rows():
    estimates = errors(baseline=(0.7, 0.5, 0.35), text=(0.8, 0.6, 0.4), logits=(0.3, 0.25, 0.2))
    found = savings(result(), estimates, {"word_error_rate": -1})
    assert found["labels"]["baseline_25"] == 40
    assert found["labels"]["text_25"] == 0
    assert found["answers"]["text_25"] == 50
    more = result()
    more["students"]["baseline_25"]["steps"] = [1000]
    assert savings(more, estimates, {"word_error_rate": -1})["labels"]["baseline_25"] == 90


def test_there_are_no_savings_without_a_reference_that_no_teacher_taught():
    taught = result()
    for name in [name for name in taught["students"] if name.startswith("baseline")]:
        del taught["students"][name]
    assert savings(taught, {}, {"word_error_rate": -1}) is None
    assert savings({**taught, "students": {}}, {}, {"word_error_rate": -1}) is None


def test_the_table_shows_ratios_with_intervals():
    shown, estimates = (
        result(),
        errors(baseline=(0.7, 0.5, 0.35), text=(0.8, 0.6, 0.4), logits=(0.3, 0.25, 0.2)),
    )
    for name, entry in shown["students"].items():
        value = estimates.get(name, {"word_error_rate": exactly(0.9)})["word_error_rate"].summary()
        entry |= {"quality": {"word_error_rate": value}, "fidelity": {}}
    shown["savings"] = savings(shown, estimates, {"word_error_rate": -1})
    ((title, headings, rows),) = savings_tables(shown)
    assert title == "Cost at the same word errors, as a ratio to baseline's"
    assert headings[1:] == ["word errors %", "text: FLOPs (seconds)", "logits: FLOPs (seconds)"]
    assert rows[1] == ["baseline_50", "50.0", "1.41 [1.41, 1.41] (2.00)", "below the least tried"]
    assert rows[2][2] == "above the most tried"
    shown["cost"]["load_of_others"] = 0.41  # what its seconds measured is not known
    ((_, headings, rows),) = savings_tables(shown)
    assert headings[2:] == ["text: FLOPs", "logits: FLOPs"]
    assert rows[1] == ["baseline_50", "50.0", "1.41 [1.41, 1.41]", "below the least tried"]


def test_a_line_says_what_each_curve_read():
    saved = {
        "curves": {"baseline": {"b1": 0.5, "b2": 1}, "text": {"t1": 0.5, "t2": 1}},
        "labels": {"b1": 40, "b2": 9000, "t1": 0, "t2": 0},
        "answers": {"b1": 0, "b2": 0, "t1": 50, "t2": 50},
    }
    expected = "baseline 40 to 9,000 labels; text 50 answers of the teacher"
    assert rows_line(saved) == f"different rows that students read: {expected}"


# -- outputs that were bought ----------------------------------------------------------------------

ROWS = (250, 1000, 4000)


def bought_result():
    """Text costs 2 per token, top_20 three times that; every token in four rows is paid."""
    found = result()
    found["students"] = {
        f"{kind}_{rows}": {
            "recipe": {
                "access": kind,
                "outputs": {"transfer_rows": rows},
                "student": {"budget_fraction": 1.0, "learning_rate": 0.01},
            },
            "quality": {},
        }
        for kind in ("text", "top_20")
        for rows in ROWS
    }
    found["cost"]["outputs_by_student"] = {
        name: {"paid": {"tokens": 50 * rows, "money": (6 if "top" in name else 2) * 50e-6 * rows}}
        for name, rows in ((name, int(name.split("_")[-1])) for name in found["students"])
    } | {"local": {"rows": 5}}
    found["config"]["cost"] = {"currency": "USD"}
    return found


def bits(**curves):
    return {
        f"{kind}_{rows}": {"word_error_rate": exactly(value)}
        for kind, values in curves.items()
        for rows, value in zip(ROWS, values, strict=True)
    }


def test_what_a_kind_of_access_needs_is_counted_in_tokens_and_money():
    estimates = bits(text=(0.8, 0.7, 0.6), top_20=(0.75, 0.65, 0.5))
    found = bought(bought_result(), estimates, {"word_error_rate": -1})
    assert found["reference"] == "text"
    assert found["curves"]["top_20"] == {
        "top_20_250": 12500,
        "top_20_1000": 5e4,
        "top_20_4000": 2e5,
    }
    needs = found["needs"]["word_error_rate"]
    assert needs["text_250"]["top_20"] == "less"
    at_seven = needs["text_1000"]["top_20"]
    assert at_seven["tokens"]["ratio"] == pytest.approx(0.5)  # half-way from 250 to 1,000 rows
    assert at_seven["money"]["ratio"] == pytest.approx(3 * 0.5)


def test_without_outputs_of_several_kinds_that_were_bought_there_is_no_such_study():
    assert bought(result(), errors(text=(3, 2, 1)), {}) is None
    one = bought_result()
    one["students"] = {n: e for n, e in one["students"].items() if n.startswith("text")}
    assert bought(one, bits(text=(3, 2, 1)), {}) is None


def test_the_table_shows_the_bill_and_what_is_not_known():
    found = bought_result()
    estimates = bits(text=(0.8, 0.7, 0.6), top_20=(0.75, 0.65, 0.5))
    for name, entry in found["students"].items():
        mean = estimates[name]["word_error_rate"].mean
        value = {"mean": mean, "ci95": [mean, mean], "per_seed": [mean]}
        entry["quality"] = {"word_error_rate": value}
    found["bought"] = bought(found, estimates, {"word_error_rate": -1})
    paid, needs = bought_tables(found)
    assert paid[2][0][:4] == ["text_250", "12,500", "0.0250", "80.0"]
    assert needs[0] == "Tokens bought at the same word errors, as a ratio to text's"
    assert needs[1][2] == "top_20: tokens (money)"
    assert [row[2] for row in needs[2]] == [
        "below the least tried", "0.50 [0.50, 0.50] (1.50)", "0.40 [0.40, 0.40] (1.19)",
    ]  # fmt: skip
