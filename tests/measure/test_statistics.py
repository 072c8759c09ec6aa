"""Estimates and intervals."""

import numpy as np
import pytest
from hypothesis import given, settings

from measure.statistics import Estimate, share_of_gap
from tests.helpers import coin, estimates, verdict


def test_the_interval_of_one_seed_is_the_binomial_one():
    metric = coin(np.random.default_rng(0), 1, 4000, 0.3)
    low, high = metric.summary()["ci95"]
    half = 1.96 * np.sqrt(0.3 * 0.7 / 4000)
    assert high - low == pytest.approx(2 * half, rel=0.1)
    assert low < metric.mean < high


def test_seeds_that_differ_widen_the_interval():
    generator = np.random.default_rng(0)
    calm, noisy = (coin(generator, 5, 2000, 0.5, spread) for spread in (0.0, 0.05))
    width = [m.summary()["ci95"][1] - m.summary()["ci95"][0] for m in (calm, noisy)]
    assert width[1] > 1.5 * width[0]


def test_statistics_hand_values():
    first, second = (
        Estimate(np.array([[[value, 1.0]] * 4 for value in values]))
        for values in ([0.5, 0.6, 0.7, 0.8], [0.4, 0.5, 0.6, 0.6])
    )
    found = verdict("a beats b", "sequence_agreement", 0.0, first, second)
    assert found["p_permutation"] == pytest.approx(2 / 2**4)  # the least that 4 seeds can show
    assert found["effect_size"] == pytest.approx(0.125 / 0.05)
    # 16 pairs: .5 beats .4 and ties .5; .6 beats 2 and ties 2; .7 and .8 beat all
    assert found["probability_of_improvement"] == pytest.approx((1.5 + 3 + 4 + 4) / 16)


def test_share_of_gap():
    metrics = [Estimate(np.full((1, 100, 2), [value, 1.0])) for value in (0.6, 0.4, 0.3)]
    found = share_of_gap(-1, *metrics)
    assert found["share"] == pytest.approx(2 / 3)
    assert found["ci95"] == pytest.approx([2 / 3, 2 / 3])
    low, student, _ = metrics
    assert share_of_gap(-1, low, student, low)["share"] is None


def test_no_gap_to_close_where_the_control_is_better_than_the_teacher():
    levels = [Estimate(np.full((1, 100, 2), [value, 1.0])) for value in (1.0, 0.98, 0.97)]
    assert share_of_gap(1, *levels)["share"] is None
    assert share_of_gap(1, *levels[::-1])["share"] == pytest.approx(1 / 3)


@given(estimates())
@settings(deadline=None, max_examples=30)
def test_an_interval_is_ordered_and_within_the_range_of_the_rows(metric):
    summary = metric.summary()
    low, high = summary["ci95"]
    assert low <= high
    assert summary["mean"] == pytest.approx(np.mean(summary["per_seed"]))
    if len(summary["per_seed"]) == 1:
        ratios = metric.columns[..., 0] / metric.columns[..., 1]
        assert ratios.min() - 1e-9 <= low <= high <= ratios.max() + 1e-9
