"""Verdicts, against hand values and simulated runs."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from measure.statistics import Estimate, corrected_for
from measure.verdicts import verdict_line as line_of
from measure.verdicts import verdicts
from tests.helpers import KNOWN, coin, compared, drawn, estimates, verdict
from tests.simulations import DOCS, SEEDS, decided, detectable, with_tables


def verdict_line(verdict):
    return line_of(verdict, KNOWN, "words")


def exactly(difference: float, error: float, seeds: int = 50):
    """Two models whose paired difference has this mean and this standard error."""
    wave = np.tile([1.0, -1.0], seeds // 2)
    spread = wave * error * math.sqrt(seeds) / wave.std(ddof=1)
    none = np.zeros((seeds, 20))
    return Estimate(0.5 + difference + spread, none), Estimate(np.full(seeds, 0.5), none)


# -- one rule --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("claim", "metric", "difference", "threshold", "result"),
    [
        ("a beats b", "sequence_agreement", 0.2, 0.0, "better"),
        ("a beats b", "sequence_agreement", -0.2, 0.0, "worse"),
        ("a beats b", "sequence_agreement", 0.015, 0.0, "not distinguished"),
        ("a beats b", "sequence_agreement", -0.015, 0.0, "not distinguished"),
        ("a beats b", "word_error_rate", 0.2, 0.0, "worse"),
        ("a beats b", "word_error_rate", -0.2, 0.0, "better"),
        ("a beats b", "sequence_agreement", 0.2, 0.15, "better"),
        ("a beats b", "sequence_agreement", 0.2, 0.25, "too little"),
        ("a beats b", "sequence_agreement", 0.2, 0.2, "not distinguished"),
        ("a beats b", "sequence_agreement", -0.2, 0.3, "worse"),
        ("a matches b", "sequence_agreement", 0.01, 0.05, "matches"),
        ("a matches b", "sequence_agreement", -0.01, 0.05, "matches"),
        ("a matches b", "sequence_agreement", 0.04, 0.05, "not distinguished"),
        ("a matches b", "sequence_agreement", -0.04, 0.05, "not distinguished"),
        ("a matches b", "sequence_agreement", 0.2, 0.05, "does not match"),
        ("a matches b", "sequence_agreement", -0.2, 0.05, "does not match"),
        ("a keeps b", "accuracy", 0.0, 0.9, "keeps"),
        ("a keeps b", "accuracy", -0.2, 0.9, "does not keep"),
        ("a keeps b", "accuracy", -0.05, 0.9, "not distinguished"),
    ],
)
def test_the_rule(claim, metric, difference, threshold, result):
    """With a standard error of 0.01."""
    found = verdict(claim, metric, threshold, *exactly(difference, 0.01))
    assert found["result"] == result
    assert found["here"] is None


@pytest.mark.parametrize(("errors", "result"), [(1.9, "not distinguished"), (2.1, "better")])
def test_the_limit_is_5_percent_of_a_two_sided_test(errors, result):
    models = exactly(0.01 * errors, 0.01)
    assert verdict("a beats b", "ece", 0.0, *models[::-1])["result"] == result


def test_one_seed_is_never_a_verdict():
    models = [coin(np.random.default_rng(i), 1, 4000, c) for i, c in enumerate((0.6, 0.4))]
    for claim, here in (("a beats b", "better"), ("a matches b", "does not match")):
        found = verdict(claim, "sequence_agreement", 0.05, *models)
        assert (found["result"], found["here"]) == ("one run", here)
    line = verdict_line(found)
    assert re.fullmatch(
        r"in this run: a is (19|20|21)\.\d points of agreement with teacher better than b on these "
        r"words \[1\d\.\d, 2\d\.\d\]; one seed shows no more",
        line,
    )


def test_beside_one_run_stand_the_committed_ones():
    models = [coin(np.random.default_rng(i), 1, 4000, c) for i, c in enumerate((0.5, 0.4))]
    found = verdict("a beats b", "sequence_agreement", 0.0, *models)
    found |= {"committed": {"mean": 0.09, "spread": 0.021, "runs": 10, "ahead": 9}}
    here = f"{100 * found['difference']:+.1f}"
    expected = f"({here} here; +9.0 ± 2.1 over 10 committed runs, better in 9 of them)"
    assert verdict_line(found).endswith(expected)


# -- corrections -----------------------------------------------------------------------------------


def test_claims_about_one_reference_are_corrected_together_and_others_apart():
    base = coin(np.random.default_rng(0), 5, 300, 0.5)
    models = [coin(np.random.default_rng(i), 5, 300, 0.5) for i in range(1, 4)]
    claims = [compared(f"{i} beats base", "ece", 0.0, m, base) for i, m in enumerate(models)]
    claims.append(compared("a beats other", "ece", 0.0, models[0], models[1]))
    claims.append(compared("a beats base", "accuracy", 0.0, models[0], base))
    claims.append(compared("a matches base", "ece", 0.05, models[0], base))
    found = verdicts(claims)
    assert [one["comparisons"] for one in found] == [3, 3, 3, 1, 1, 1]
    for one in found:
        assert one["p_corrected"] == corrected_for(one["p_value"], one["comparisons"])
    together = verdicts(claims, together=True)
    assert {one["comparisons"] for one in together} == {6}
    for one in together:
        assert one["p_corrected"] == pytest.approx(1 - (1 - one["p_value"]) ** 6)


def test_the_order_of_the_names_changes_no_correction():
    base, *models = (coin(np.random.default_rng(i), 5, 300, 0.5) for i in range(4))
    there = [compared(f"m{i} beats base", "ece", 0.0, m, base) for i, m in enumerate(models)]
    back = [compared(f"base beats m{i}", "ece", 0.0, base, m) for i, m in enumerate(models)]
    for one, other in zip(verdicts(there), verdicts(back), strict=True):
        assert one["comparisons"] == other["comparisons"] == 3
        assert one["p_corrected"] == pytest.approx(other["p_corrected"])
    mixed = verdicts([there[0], back[1], compared("a beats b", "ece", 0.0, *models[:2])])
    assert [one["comparisons"] for one in mixed] == [2, 2, 1]


@given(st.lists(estimates(seeds=2), min_size=2, max_size=5))
@settings(deadline=None, max_examples=4)
def test_more_claims_never_make_one_of_them_more_certain(models):
    claims = [compared("a beats b", "ece", 0.0, models[0], model) for model in models[1:]]
    together = verdicts(claims)
    for claim, found in zip(claims, together, strict=True):
        assert verdicts([claim])[0]["p_corrected"] <= found["p_corrected"] <= 1


@given(estimates(seeds=3), estimates(seeds=3))
@settings(deadline=None, max_examples=10)
def test_a_reversed_comparison_is_its_mirror_image(first, second):
    there, back = (
        verdict("a beats b", "sequence_agreement", 0.0, *models)
        for models in ((first, second), (second, first))
    )
    assert there["difference"] == pytest.approx(-back["difference"], abs=1e-12)
    assert there["ci95"] == pytest.approx([-bound for bound in back["ci95"][::-1]], abs=1e-12)
    assert there["p_value"] == pytest.approx(back["p_value"])
    mirrored = {"better": "worse", "worse": "better"}
    assert back["result"] == mirrored.get(there["result"], there["result"])
    lower = verdict("a beats b", "word_error_rate", 0.0, first, second)
    assert lower["difference"] == pytest.approx(-there["difference"], abs=1e-12)


# -- how often it errs -----------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", SEEDS)
def test_equal_models_are_called_different_in_at_most_5_percent_of_simulated_runs(seeds):
    assert decided("not distinguished", seeds, runs=1500) >= 0.95


@pytest.mark.parametrize("seeds", [2, 5])
@pytest.mark.parametrize("truth", [0.1, -0.1])
def test_models_as_far_apart_as_the_margin_match_in_at_most_5_percent(seeds, truth):
    found = decided("matches", seeds, runs=1000, truth=truth, verb="matches", threshold=0.1)
    assert found <= 0.05


@pytest.mark.parametrize("seeds", [2, 5])
def test_a_share_that_is_just_kept_is_decided_in_at_most_5_percent(seeds):
    found = decided("not distinguished", seeds, runs=1000, truth=-0.05, verb="keeps", threshold=0.9)
    assert found >= 0.95


def test_one_of_many_equal_methods_is_called_better_in_at_most_5_percent():
    """Half of the errors of a two-sided test are in this direction."""
    assert decided("better", 5, runs=500, methods=8) <= 0.045


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_the_detectable_difference_is_found_in_8_of_10_simulated_runs(seeds):
    power = decided("better", seeds, runs=800, truth=detectable(seeds, 1.0))
    assert power == pytest.approx(0.8, abs=0.07)


@pytest.mark.slow
def test_the_tables_in_the_docs_are_those_of_the_simulations():
    text = DOCS.read_text(encoding="utf-8")
    assert with_tables(text) == text


# -- how many seeds would decide -------------------------------------------------------------------


def test_the_number_of_seeds_needed_by_hand():
    """A paired t-test with an effect of 0.5 deviations needs 34 seeds for a power of 0.8."""
    first, second = exactly(0.05, 0.1 / math.sqrt(10), seeds=10)
    found = verdict("a beats b", "accuracy", 0.0, first, second)
    assert found["result"] == "not distinguished"
    assert found["seeds_needed"] == pytest.approx(34, abs=1)
    assert f"({found['seeds_needed']} seeds would show a difference of this" in verdict_line(found)
    corrected = verdicts([compared("a beats b", "accuracy", 0.0, first, second)] * 5)[0]
    assert corrected["seeds_needed"] > 40


def test_where_rows_are_too_few_no_number_of_seeds_decides():
    generator = np.random.default_rng(2)
    models = [drawn(generator, 4, 30, level, common=1.0) for level in (0.55, 0.5)]
    found = verdict("a beats b", "accuracy", 0.0, *models)
    assert (found["result"], found["seeds_needed"]) == ("not distinguished", None)
    assert "(more rows would decide it, more seeds would not)" in verdict_line(found)


def test_a_match_needs_seeds_for_the_nearer_margin():
    models = exactly(0.03, 0.02, seeds=10)
    match = verdict("a matches b", "accuracy", 0.05, *models)
    beats = verdict("a beats b", "accuracy", 0.05, *models)
    assert match["seeds_needed"] == beats["seeds_needed"] > 10


@pytest.mark.parametrize("difference", [0.0, 0.01, -0.03, 0.08])
def test_the_p_value_of_a_match_is_the_larger_of_two_one_sided_tests(difference):
    first, second = exactly(difference, 0.02)
    found = verdict("a matches b", "accuracy", 0.05, first, second)
    differences = first.per_seed - second.per_seed
    expected = max(
        stats.ttest_1samp(differences, margin, alternative=side).pvalue
        for margin, side in ((0.05, "less"), (-0.05, "greater"))
    )
    assert found["p_value"] == pytest.approx(expected)


# -- sentences -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("claim", "metric", "difference", "threshold", "line"),
    [
        ("a beats b", "accuracy", 0.2, 0.0,
         "a is 20.0 points of right answers better than b [18.0, 22.0] over 50 seeds"),
        ("a beats b", "word_error_rate", 0.2, 0.0,
         "a is 20.0 points of word errors worse than b [18.0, 22.0] over 50 seeds"),
        ("a beats b", "kl_teacher_student", -0.2, 0.0,
         "a is 0.200 nats of KL to teacher better than b [0.180, 0.220] over 50 seeds"),
        ("a beats b", "accuracy", 0.2, 0.3,
         "too little: a is 20.0 points of right answers better than b [18.0, 22.0] over 50 seeds, "
         "more than 30 claimed"),
        ("a beats b", "accuracy", -0.01, 0.0,
         "not distinguished: a is 1.0 points of right answers worse than b [-1.0, 3.0] over 50 "
         "seeds ("),
        ("a matches b", "accuracy", 0.01, 0.05,
         "a matches b within 1.0 points of right answers [-1.0, 3.0] over 50 seeds, margin 5"),
        ("a matches b", "accuracy", 0.2, 0.05,
         "does not match: a is 20.0 points of right answers better than b [18.0, 22.0] over 50 "
         "seeds, margin 5"),
        ("a keeps b", "accuracy", 0.0, 0.9,
         "a keeps 100.0 % of the right answers of b [96.0, 104.0] over 50 seeds, 90 % needed"),
        ("a keeps b", "accuracy", -0.05, 0.9,
         "not distinguished: a keeps 90.0 % of the right answers of b [86.0, 94.0] over 50 seeds, "
         "90 % needed ("),
    ],
)  # fmt: skip
def test_a_verdict_line_states_the_result(claim, metric, difference, threshold, line):
    found = verdict_line(verdict(claim, metric, threshold, *exactly(difference, 0.01)))
    assert found == line or (line.endswith("(") and found.startswith(line))


def test_an_exploratory_result_says_so():
    models = exactly(0.2, 0.01)
    one = replace(compared("a beats b", "accuracy", 0.0, *models), exploratory=True)
    (found,) = verdicts([one])
    assert verdict_line(found).startswith("exploratory: a is 20.0 points of right answers better")
    (unsure,) = verdicts([replace(one, second=one.first)])
    assert verdict_line(unsure).startswith("exploratory: not distinguished: a is 0.0 points")


def test_one_reference_is_said_to_be_one():
    several, _ = exactly(0.2, 0.01)
    teacher = Estimate(np.array([0.5]), np.zeros((1, 20)), is_one_model=True)
    for models, better in (((several, teacher), "better"), ((teacher, several), "worse")):
        found = verdict("a beats b", "accuracy", 0.0, *models)
        assert found["result"] == better
        assert verdict_line(found).endswith("over 50 seeds against one model")


def test_a_student_with_one_seed_decides_nothing_however_many_the_other_has():
    several, _ = exactly(0.2, 0.01)
    one = Estimate(np.array([0.5]), np.zeros((1, 20)))
    for models in ((several, one), (one, several)):
        assert verdict("a beats b", "accuracy", 0.0, *models)["result"] == "one run"


def test_nothing_can_be_kept_of_nothing():
    zero = Estimate(np.zeros(50), np.zeros((50, 20)))
    found = verdict("a keeps b", "accuracy", 0.9, exactly(0.1, 0.01)[0], zero)
    assert found["share"] is None
    assert found["result"] == "not distinguished"
    assert verdict_line(found).startswith("not distinguished: b has no right answers to keep")
