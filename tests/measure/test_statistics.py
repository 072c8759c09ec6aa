"""Estimates: hand values, and the coverage of the intervals in simulated runs."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from scipy import stats

from configs.schema import LabError
from measure.statistics import (
    Estimate,
    calibrated_error,
    corrected_for,
    expected_calibration_error,
    level_of_one,
    share_of_gap,
)
from tests.helpers import coin, drawn, estimates
from tests.simulations import RATIOS, SEEDS, coverage

# -- one estimate ----------------------------------------------------------------------------------


def test_the_interval_of_one_seed_is_the_binomial_one():
    metric = coin(np.random.default_rng(0), 1, 4000, 0.3)
    low, high = metric.interval
    half = 1.96 * np.sqrt(0.3 * 0.7 / 4000)
    assert high - low == pytest.approx(2 * half, rel=0.03)
    assert (low + high) / 2 == pytest.approx(metric.mean)


def test_the_influence_of_a_row_is_what_a_small_weight_on_it_changes():
    generator = np.random.default_rng(0)
    columns = generator.random((2, 30, 6))
    for statistic in (expected_calibration_error, calibrated_error):
        found = Estimate.of(columns, statistic)
        more = columns.copy()
        more[:, 4] *= 1 + 1e-5
        fewer = columns * (1 - 1e-5 / 30)
        change = statistic(more.sum(1) + fewer.sum(1) - columns.sum(1)) - statistic(columns.sum(1))
        assert found.influence[:, 4] == pytest.approx(change / 1e-5, rel=1e-3)


def test_variances_by_hand():
    """Two seeds of two rows; the mean of a row's influences is common, the rest is its seed's."""
    estimate = Estimate(np.array([0.5, 0.7]), np.array([[0.3, -0.3], [0.1, -0.1]]))
    between, rows = estimate.variances
    assert between == pytest.approx(0.02)
    over_rows = 2 * (0.2**2 + 0.2**2)  # R / (R - 1) = 2
    single = 2 * (4 * 0.1**2) / (2 - 1)
    assert rows == pytest.approx(over_rows - single / 2)
    assert estimate.standard_error() == pytest.approx(math.sqrt(0.02 / 2 + rows))
    assert estimate.standard_error(8) == pytest.approx(math.sqrt(0.02 / 8 + rows))


def test_quantiles_are_students_weighted_by_the_variances():
    estimate = coin(np.random.default_rng(0), 3, 500, 0.5, 0.05)
    between, rows = estimate.variances
    for level in (0.05, 0.001):
        by_seeds, by_rows = stats.t.isf(level / 2, 2), stats.t.isf(level / 2, 499)
        expected = (between / 3 * by_seeds + rows * by_rows) / (between / 3 + rows)
        assert estimate.critical(level) == pytest.approx(expected)
    assert estimate.critical(0.05, seeds=10_000) == pytest.approx(1.96, abs=0.01)


def test_the_p_value_is_the_level_whose_interval_just_reaches_the_value():
    estimate = coin(np.random.default_rng(0), 4, 300, 0.5, 0.03)
    for bound in estimate.interval:
        assert estimate.p_value(bound) == pytest.approx(0.05)
    assert estimate.p_value(estimate.mean) == pytest.approx(1)
    assert estimate.p_value(estimate.mean + 0.2) < estimate.p_value(estimate.mean + 0.1) < 1


def test_a_p_value_of_seeds_alone_is_that_of_a_t_test():
    values = np.array([0.52, 0.55, 0.49, 0.58])
    estimate = Estimate(values, np.zeros((4, 50)))
    for value in (0.5, 0.4, 0.0):
        assert estimate.p_value(value) == pytest.approx(stats.ttest_1samp(values, value).pvalue)


def test_where_nothing_varies_only_the_same_value_is_possible():
    constant = Estimate.of(np.full((3, 20, 2), [0.4, 1.0]))
    assert constant.interval == pytest.approx([0.4, 0.4])
    assert constant.p_value(0.4) == 1
    assert constant.p_value(0.41) == 0


def test_a_difference_is_paired_by_row_and_by_seed():
    metric = coin(np.random.default_rng(0), 3, 1000, 0.4)
    shifted = Estimate(metric.per_seed + 0.1, metric.influence)
    assert (shifted - metric).interval == pytest.approx([0.1, 0.1])
    one = Estimate(metric.per_seed[:1], metric.influence[:1], is_one_model=True)
    assert (metric - one).per_seed == pytest.approx(metric.per_seed - metric.per_seed[0])
    assert (one - metric).per_seed == pytest.approx(metric.per_seed[0] - metric.per_seed)
    fewer = Estimate(metric.per_seed[:2] - 0.2, metric.influence[:2])
    assert (metric - fewer).per_seed == pytest.approx([0.2, 0.2])  # of the seeds that both have


def test_a_ratio_has_the_standard_error_of_the_delta_method():
    generator = np.random.default_rng(0)
    first, second = (coin(generator, 400, 50, c, 0.02) for c in (0.5, 0.8))
    share = first / second
    assert share.mean == pytest.approx(first.mean / second.mean)
    assert share.standard_error() == pytest.approx(
        (first.per_seed / second.per_seed).std(ddof=1) / 20, rel=0.15
    )
    assert (first / first).interval == pytest.approx([1.0, 1.0])


@given(estimates())
@settings(deadline=None, max_examples=30)
def test_an_interval_is_centred_on_the_mean(metric):
    summary = metric.summary()
    low, high = summary["ci95"]
    assert low <= high
    assert (low + high) / 2 == pytest.approx(summary["mean"])
    assert summary["mean"] == pytest.approx(np.mean(summary["per_seed"]))


# -- the share of a gap ----------------------------------------------------------------------------


def test_share_of_gap():
    metrics = [Estimate.of(np.full((1, 100, 2), [value, 1.0])) for value in (0.6, 0.4, 0.3)]
    found = share_of_gap(-1, *metrics)
    assert found["share"] == pytest.approx(2 / 3)
    assert found["ci95"] == pytest.approx([2 / 3, 2 / 3])
    low, student, _ = metrics
    assert share_of_gap(-1, low, student, low)["share"] is None


def test_no_gap_to_close_where_the_control_is_better_than_the_teacher():
    levels = [Estimate.of(np.full((1, 100, 2), [value, 1.0])) for value in (1.0, 0.98, 0.97)]
    assert share_of_gap(1, *levels)["share"] is None
    assert share_of_gap(1, *levels[::-1])["share"] == pytest.approx(1 / 3)


def test_a_gap_of_less_than_four_standard_errors_has_no_share():
    generator = np.random.default_rng(0)
    low, student, high = (drawn(generator, 5, 100, level) for level in (0.5, 0.52, 0.55))
    gap = high - low
    for wanted, share in ((3.9, False), (4.1, True)):
        shift = wanted * gap.standard_error() - gap.mean
        moved = Estimate(high.per_seed + shift, high.influence)
        assert (share_of_gap(1, low, student, moved)["share"] is not None) == share


# -- coverage --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_intervals_cover_the_truth_in_95_of_100_simulated_runs(seeds, ratio):
    assert 0.93 <= coverage(seeds, ratio, runs=1500) <= 0.985


@pytest.mark.parametrize(("seeds", "rows", "chance"), [(2, 60, 0.98), (2, 200, 0.99), (3, 60, 0.9)])
def test_models_that_are_right_equally_often_are_seldom_called_different(seeds, rows, chance):
    """Right and wrong answers: often all seeds differ by the same few rows."""
    generator, apart, runs = np.random.default_rng(0), 0, 1000
    for _ in range(runs):
        first, second = (coin(generator, seeds, rows, chance) for _ in range(2))
        apart += (first - second).p_value() <= 0.05
    assert apart / runs <= 0.05


def test_one_row_has_no_interval():
    with pytest.raises(LabError, match="one row has no interval"):
        Estimate.of(np.ones((2, 1, 2)))


@pytest.mark.parametrize("seeds", [3, 10])
def test_intervals_of_a_share_of_a_gap_cover_the_truth(seeds):
    generator = np.random.default_rng(seeds)
    runs, covered, shown = 2000, 0, 0
    for _ in range(runs):
        row = 0.3 * generator.standard_normal(200)
        low, student, high = (
            drawn(generator, count, 200, level, 0.02, row=row)
            for count, level in ((seeds, 0.4), (seeds, 0.52), (1, 0.6))
        )
        high = replace(high, is_one_model=True)
        # The teacher is one model: its own luck belongs to the truth.
        truth = (0.52 - 0.4) / (high.per_seed[0] - 0.4)
        found = share_of_gap(1, low, student, high)
        if found["share"] is not None:
            shown += 1
            covered += found["ci95"][0] <= truth <= found["ci95"][1]
    assert shown > 0.8 * runs
    assert 0.93 <= covered / shown <= 0.98, covered / shown


# -- many comparisons with one reference -----------------------------------------------------------


@pytest.mark.parametrize("comparisons", [2, 3])
def test_the_correction_is_dunnetts(comparisons):
    """The chance that none of equally correlated normal deviations exceeds the one found."""
    covariance = np.full((comparisons, comparisons), 0.5) + 0.5 * np.eye(comparisons)
    normal = stats.multivariate_normal(cov=covariance)
    for p in (0.2, 0.04, 0.003):
        z = stats.norm.isf(p / 2)
        inside = normal.cdf(np.full(comparisons, z), lower_limit=np.full(comparisons, -z))
        assert corrected_for(p, comparisons) == pytest.approx(1 - inside, abs=2e-5)


def test_the_correction_lies_between_none_and_bonferronis():
    for comparisons in (2, 10, 60):
        for p in (1e-12, 1e-5, 0.01, 0.5, 1.0):
            assert p <= corrected_for(p, comparisons) <= min(1.0, comparisons * p) + 1e-9
        assert corrected_for(1e-12, comparisons) == pytest.approx(comparisons * 1e-12, rel=0.01)
        assert corrected_for(level_of_one(comparisons), comparisons) == pytest.approx(0.05)
    assert corrected_for(0.3, 1) == 0.3


def test_the_correction_for_a_textbook_example():
    """Dunnett 1955, table 2a: 2.21 standard errors for two treatments and very many freedoms."""
    assert stats.norm.isf(level_of_one(2) / 2) == pytest.approx(2.21, abs=0.005)
    assert stats.norm.isf(level_of_one(9) / 2) == pytest.approx(2.69, abs=0.005)


# -- calibration -----------------------------------------------------------------------------------


def test_the_ece_of_a_calibrated_model_is_what_chance_leaves():
    generator = np.random.default_rng(0)
    confidence = np.repeat([0.15, 0.45, 0.9], [300, 200, 500])
    bins = np.repeat([0, 1, 2], [300, 200, 500])
    found = []
    for _ in range(400):
        hits = generator.random(1000) < confidence
        sums = np.concatenate(
            [np.bincount(bins, weights=w) for w in (np.ones(1000), confidence, hits)]
        )
        found.append(expected_calibration_error(sums))
    assert calibrated_error(sums) == pytest.approx(np.mean(found), rel=0.03)


@pytest.mark.parametrize("rows", [2, 4])
def test_few_rows_have_the_quantile_of_their_number(rows):
    values = np.array([[0.3, 0.4, 0.8, 0.9][:rows]])
    estimate = Estimate(values.mean(1), values - values.mean())
    assert estimate.critical(0.05) == pytest.approx(stats.t.isf(0.025, rows - 1))


def test_two_models_by_nature_are_compared_over_rows_alone():
    """Such as two teachers: there are no seeds to pair."""
    generator = np.random.default_rng(0)
    first, second = (
        Estimate(one.per_seed[:1], one.influence[:1], is_one_model=True)
        for one in (drawn(generator, 1, 50, level) for level in (0.6, 0.4))
    )
    difference = first - second
    assert difference.seeds == 1
    assert difference.mean == pytest.approx(first.mean - second.mean)
