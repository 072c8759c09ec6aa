"""The measures, against hand values; the verdicts, against simulated runs."""

import math
import re
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from measure.statistics import Estimate
from measure.verdicts import verdict_line as line_of
from measure.verdicts import verdicts
from tests.helpers import KNOWN, coin, compared, estimates, verdict


def verdict_line(verdict):
    return line_of(verdict, KNOWN)


def test_differences_are_paired_by_row_and_seed():
    metric = coin(np.random.default_rng(0), 3, 1000, 0.4)
    shifted = Estimate(metric.columns + np.array([0.1, 0.0]))
    found = verdict("a beats b", "sequence_agreement", 0.0, shifted, metric)
    assert found["difference"] == pytest.approx(0.1)
    assert found["ci95"] == pytest.approx([0.1, 0.1])
    assert found["result"] == "beats"


def test_differences_are_paired_by_row_between_one_seed_and_several():
    metric = coin(np.random.default_rng(0), 1, 1000, 0.4)
    several = Estimate(np.repeat(metric.columns, 3, axis=0))
    assert np.ptp(metric.resamples - several.resamples) < 1e-12


@pytest.mark.parametrize(
    ("metric", "first", "second", "threshold", "result"),
    [
        ("sequence_agreement", 0.6, 0.4, 0.0, "beats"),
        ("sequence_agreement", 0.6, 0.4, 0.3, "does not beat"),
        ("sequence_agreement", 0.6, 0.4, 0.2, "inconclusive"),
        ("word_error_rate", 0.6, 0.4, 0.0, "does not beat"),
        ("word_error_rate", 0.4, 0.6, 0.0, "beats"),
    ],
)
def test_verdicts(metric, first, second, threshold, result):
    generator = np.random.default_rng(0)
    models = coin(generator, 5, 4000, first), coin(generator, 5, 4000, second)
    assert verdict("a beats b", metric, threshold, *models)["result"] == result


def simulated(generator, seeds, rows, truth, between_seeds, between_rows=0.3, against=None):
    """Two models whose rows and seeds vary as in real runs; the first is better by `truth`. The
    second may have another number of seeds; with one seed there is no variance between seeds."""
    row = between_rows * generator.standard_normal((1, rows))
    models = []
    for better, count in ((truth, seeds), (0.0, against or seeds)):
        luck = between_seeds if count > 1 else 0.0
        level = better + luck * generator.standard_normal((count, 1))
        noise = between_rows * generator.standard_normal((count, rows))
        values = 0.5 + row + level + noise
        models.append(Estimate(np.stack([values, np.ones_like(values)], axis=-1)))
    return compared("a beats b", "sequence_agreement", 0.0, *models)


def share_that_beats(truth, seeds, count, claims=1, between_seeds=0.01):
    generator = np.random.default_rng(seeds)
    beats = 0
    with patch("gc.collect"):  # multipletests collects garbage at every call, for 0.1 s
        for _ in range(count):
            found = verdicts(
                [simulated(generator, seeds, 150, truth, between_seeds) for _ in range(claims)]
            )
            beats += any(one["result"] == "beats" for one in found)
    return beats / count


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_no_difference_is_called_one_in_at_most_5_percent_of_simulated_runs(seeds):
    assert share_that_beats(0.0, seeds, count=1000) <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "against"), [(1, 1), (5, 1)])
def test_where_one_side_has_one_seed_the_claim_is_about_that_seed(seeds, against):
    """The interval covers rows, and the seeds of a model that has several; the line states it."""
    generator, beats = np.random.default_rng(seeds), 0
    with patch("gc.collect"):
        for _ in range(1000):
            found = verdicts([simulated(generator, seeds, 150, 0.0, 0.01, against=against)])[0]
            beats += found["result"] == "beats"
    assert "over 1 seed" in verdict_line(found) or "against one" in verdict_line(found)
    assert beats / 1000 <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_models_as_far_apart_as_the_margin_match_in_at_most_5_percent_of_simulated_runs(seeds):
    generator, matches = np.random.default_rng(seeds), 0
    with patch("gc.collect"):
        for _ in range(500):
            one = simulated(generator, seeds, 150, 0.03, 0.01)
            equal = compared("a matches b", one.metric, 0.03, one.first, one.second)
            matches += verdicts([equal])[0]["result"] == "matches"
    assert matches / 500 <= 0.05


@pytest.mark.slow
def test_many_claims_without_a_difference_are_corrected():
    assert share_that_beats(0.0, 5, count=250, claims=4) <= 0.05


@pytest.mark.slow
def test_a_difference_of_the_stated_size_is_found_in_at_least_80_percent():
    generator = np.random.default_rng(0)
    pilot = simulated(generator, 2000, 150, 0.05, 0.03)  # many seeds: the true size and deviation
    needed = pilot.seeds_needed()
    # Seeds: 2 x 0.03^2; rows of a seed: 2 x 0.3^2 / 150, which the rule counts once in the seeds'
    # deviation and once over rows. d = 0.05 / 0.065 = 0.77, and a paired t-test wants 16 seeds.
    assert needed == pytest.approx(16, abs=1)
    assert share_that_beats(0.05, needed, count=500, between_seeds=0.03) >= 0.8


def test_an_inconclusive_claim_gives_the_number_of_seeds_it_needs():
    generator = np.random.default_rng(0)
    found = verdicts([simulated(generator, 3, 400, 0.01, 0.02)])[0]
    assert found["result"] == "inconclusive"
    assert found["seeds_needed"] > 3
    assert f"({found['seeds_needed']} seeds would show" in verdict_line(found)


@pytest.mark.parametrize(
    ("truth", "rows", "result"),
    [(0.0, 4000, "matches"), (0.2, 4000, "does not match"), (0.0, 20, "inconclusive")],
)
def test_a_match_is_an_equivalence_test_with_a_margin_and_not_a_large_p(truth, rows, result):
    generator = np.random.default_rng(0)
    models = simulated(generator, 5, rows, truth, between_seeds=0.005)
    claim = compared("a matches b", "sequence_agreement", 0.05, models.first, models.second)
    found = verdicts([claim])[0]
    assert found["result"] == result
    assert "margin 5" in verdict_line(found)


@pytest.mark.parametrize(
    ("truth", "rows", "result"),
    [(0.0, 4000, "keeps"), (-0.1, 4000, "does not keep"), (-0.02, 20, "inconclusive")],
)
def test_a_share_is_kept_if_the_model_beats_that_share_of_the_other(truth, rows, result):
    generator = np.random.default_rng(0)
    models = simulated(generator, 5, rows, truth, between_seeds=0.005)
    claim = compared("a keeps b", "accuracy", 0.95, models.first, models.second)
    found = verdicts([claim])[0]
    assert found["result"] == result
    assert found["share"] == pytest.approx(models.first.mean / models.second.mean)
    assert found["share_ci95"][0] < found["share"] < found["share_ci95"][1]
    assert found["difference"] == pytest.approx(models.first.mean - 0.95 * models.second.mean)
    expected = f"a keeps {100 * found['share']:.1f} % of the right answers of b ["
    opening = {"keeps": "", "inconclusive": "inconclusive: "}.get(result, "not supported: ")
    assert verdict_line(found).startswith(opening + expected)
    assert "95 % needed" in verdict_line(found)


def test_a_verdict_line_states_the_result():
    models = (coin(np.random.default_rng(i), s, 4000, c) for i, s, c in ((0, 5, 0.6), (1, 5, 0.4)))
    line = verdict_line(verdict("a beats b", "sequence_agreement", 0.0, *models))
    assert re.fullmatch(
        r"a beats b by (19|20)\.\d points of agreement with teacher \[1\d\.\d, 2\d\.\d\] over "
        "5 seeds",
        line,
    )
    one = coin(np.random.default_rng(0), 1, 400, 0.5)
    assert "over 1 seed (the interval is over rows alone)" in verdict_line(
        verdict("a beats b", "word_error_rate", 0.0, one, one)
    )


def test_a_claim_lost_to_the_correction_is_reported_as_such():
    """Its interval lies above the threshold, so the line has to explain why it is inconclusive."""
    models = [coin(np.random.default_rng(i), 5, 100, c) for i, c in ((0, 0.6), (1, 0.4))]
    found = verdict("a beats b", "sequence_agreement", 0.0, *models)
    low = found["ci95"][0]
    assert low > 0
    unsure = {**found, "result": "inconclusive", "seeds_needed": 9}
    line = "significant alone, not after correction for all claims; 9 seeds would show"
    assert line in verdict_line(unsure)
    assert line not in verdict_line({**unsure, "threshold": low + 0.01})


# -- properties ------------------------------------------------------------------------------------


@given(estimates(seeds=3), estimates(seeds=3))
@settings(deadline=None, max_examples=4)
def test_a_reversed_comparison_is_its_mirror_image(first, second):
    there, back = (
        verdict("a beats b", "sequence_agreement", 0.0, *models)
        for models in ((first, second), (second, first))
    )
    assert there["difference"] == pytest.approx(-back["difference"], abs=1e-12)
    assert there["ci95"] == pytest.approx([-bound for bound in back["ci95"][::-1]], abs=1e-12)
    assert there["p_permutation"] == pytest.approx(back["p_permutation"])
    both = there["probability_of_improvement"] + back["probability_of_improvement"]
    assert both == pytest.approx(1)
    assert (there["result"], back["result"]) != ("beats", "beats")
    lower = verdict("a beats b", "word_error_rate", 0.0, first, second)
    assert lower["difference"] == pytest.approx(-there["difference"], abs=1e-12)


@given(st.lists(estimates(seeds=2), min_size=2, max_size=5))
@settings(deadline=None, max_examples=4)
def test_more_claims_never_make_one_of_them_more_certain(models):
    claims = [compared("a beats b", "ece", 0.0, models[0], model) for model in models[1:]]
    together = verdicts(claims)
    for claim, found in zip(claims, together, strict=True):
        assert verdicts([claim])[0]["p_holm"] <= found["p_holm"] <= 1


# -- the committed results and the README ----------------------------------------------------------


def test_the_correction_is_holms_recomputed_by_hand():
    """The smallest p times the number of claims, the next times one less, never decreasing."""
    chances = [(0.62, 0.5), (0.6, 0.5), (0.55, 0.5), (0.5, 0.5)]
    comparisons = [
        compared(
            "a beats b",
            "sequence_agreement",
            0.0,
            coin(np.random.default_rng(i), 5, 300, first),
            coin(np.random.default_rng(10 + i), 5, 300, second),
        )
        for i, (first, second) in enumerate(chances)
    ]
    values = [c.p_value for c in comparisons]
    corrected, largest = {}, 0.0
    for place, i in enumerate(sorted(range(4), key=lambda i: values[i])):
        largest = max(largest, min(1.0, (4 - place) * values[i]))
        corrected[i] = largest
    found = [one["p_holm"] for one in verdicts(comparisons)]
    assert found == pytest.approx([corrected[i] for i in range(4)])
    assert found[0] > 3 * values[0]


def test_a_p_value_is_that_of_a_t_test_about_the_margin():
    """With many rows the noise is that between seeds: the p of a paired t test, shifted by the
    margin; 1 where the difference equals the margin."""
    first, second = (
        coin(np.random.default_rng(i), 6, 20_000, c, 0.05) for i, c in enumerate((0.6, 0.5))
    )
    differences = first.per_seed - second.per_seed
    for margin in (0.0, 0.05, -0.03):
        comparison = compared("a beats b", "sequence_agreement", margin, first, second)
        by_hand = stats.ttest_1samp(differences, margin).pvalue
        assert math.log(comparison.p_value) == pytest.approx(math.log(by_hand), rel=0.35)
    exact = compared("a beats b", "sequence_agreement", float(differences.mean()), first, second)
    assert exact.p_value == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("direction", [1, -1])
def test_an_equivalence_needs_both_sides(direction):
    """A difference far below the margin, on either side, is no match."""
    chances = (0.6, 0.4)[::direction]
    models = (coin(np.random.default_rng(i), 5, 2000, c) for i, c in enumerate(chances))
    found = verdict("a matches b", "sequence_agreement", 0.05, *models)
    assert found["result"] == "does not match"
    assert found["p_holm"] > 0.9
