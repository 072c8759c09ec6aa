"""Checks of lab 3. Each failure names the likeliest misconception by its signature."""

import numpy as np
import pytest
from scipy import stats

from labs.checks.tools import close, require_predictions


@pytest.mark.points(1)
def test_steps_share_a_budget_with_the_outputs(lab, draw):
    teacher, step = float(draw.uniform(1e12, 2e12)), float(draw.uniform(1e6, 2e6))
    outputs = 0.03 * teacher
    found = lab.call("steps_at_equal_cost", teacher, 0.1, outputs, step)
    if found == int(0.1 * teacher // step):
        pytest.fail("steps_at_equal_cost: the outputs are not paid")
    assert found == int((0.1 * teacher - outputs) // step)
    assert lab.call("steps_at_equal_cost", teacher, 0.02, outputs, step) == 0


@pytest.mark.points(3)
def test_interval_is_students(lab, draw):
    values = draw.normal(1, 2, 4)
    mean, n = values.mean(), len(values)
    low, high = lab.call("interval", values.tolist())

    def half(quantile, ddof, root):
        return quantile * values.std(ddof=ddof) / root

    t, z = stats.t.ppf(0.975, n - 1), stats.norm.ppf(0.975)
    signatures = {
        "1.96 is for many seeds; with few, Student's t is larger": half(z, 1, n**0.5),
        "the standard deviation divides by n, not by n - 1": half(t, 0, n**0.5),
        "this is the spread of one seed; divide by the square root of n": half(t, 1, 1),
        "divide by the square root of n, not by n": half(t, 1, n),
        "one side has 5 %: use 0.975": half(stats.t.ppf(0.95, n - 1), 1, n**0.5),
    }
    for signature, wrong in signatures.items():
        if close(high - mean, wrong):
            pytest.fail(f"interval: {signature}")
    assert close(high - mean, half(t, 1, n**0.5)), "interval: another width than expected"
    assert close(low + high, 2 * mean), "interval: its middle is not the mean"


@pytest.mark.hidden
@pytest.mark.points(1)
def test_interval_holds_the_truth_in_95_percent_of_cases(lab, draw):
    held = 0
    for _ in range(600):
        low, high = lab.call("interval", draw.normal(0, 1, 3).tolist())
        held += low <= 0 <= high
    assert 0.92 <= held / 600 <= 0.98, f"interval: it holds the truth in {held / 6:.0f} % of cases"


@pytest.mark.points(2)
def test_rule_knows_the_direction_and_what_it_does_not_know(lab):
    cases = {
        (0.1, 0.3, False): "better", (0.1, 0.3, True): "worse", (-0.3, -0.1, False): "worse",
        (-0.3, -0.1, True): "better", (-0.1, 0.2, False): "not distinguished",
        (-0.1, 0.2, True): "not distinguished", (0.0, 0.2, False): "not distinguished",
    }  # fmt: skip
    found = {case: lab.call("rule", *case) for case in cases}
    if all(found[low, high, True] == found[low, high, False] for low, high, _ in cases
           if (low, high, True) in cases and (low, high, False) in cases):  # fmt: skip
        pytest.fail("rule: the direction of the metric makes no difference")
    for case, expected in cases.items():
        assert found[case] == expected, f"rule{case}: found {found[case]!r}, expected {expected!r}"


@pytest.mark.points(1)
def test_tuning_never_sees_the_test_split(lab, draw):
    for _ in range(20):
        validation, test = draw.normal(size=(2, 6)).tolist()
        found = lab.call("chosen", validation, test)
        if np.argmin(test) != np.argmin(validation) and found == np.argmin(test):
            pytest.fail("chosen: by the test errors; the reported ones are then too low")
        assert found == np.argmin(validation)


@pytest.mark.points(1)
def test_a_prediction_is_made_before_each_exercise_of_lab_3(lab):
    require_predictions(lab, "3.1", "3.2", "3.3", "3.4")
