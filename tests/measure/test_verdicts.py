"""The measures, against hand values; the verdicts, against simulated runs."""

import json
import re
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experiment.reading import read_config
from experiment.reference import other_configs
from measure.fidelity import ECE_BINS, Expectations, calibration, sum_by_row
from measure.laws import Law, fit_law
from measure.metrics import METRICS, metrics_of
from measure.report.tables import BLOCK, with_tables
from measure.statistics import Estimate, expected_calibration_error, share_of_gap
from measure.verdicts import Comparison, verdicts
from measure.verdicts import verdict_line as line_of
from tasks.pronounce import Pronounce
from tasks.reason import Reason

ROOT = Path(__file__).parents[2]


KNOWN = metrics_of(Pronounce) | metrics_of(Reason)


def verdict_line(verdict):
    return line_of(verdict, KNOWN)


def compared(claim, metric, threshold, first, second):
    return Comparison(claim, metric, KNOWN[metric].sign, threshold, first, second)


def fidelity(teacher, student, targets):
    """Every metric over positions that is one number per position."""
    at = Expectations(teacher, student, targets)
    return {n: m.positions(at) for n, m in METRICS.items() if m.positions and not m.statistic}


def test_fidelity_hand_values():
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.25, 0.5]])
    found = fidelity(p.log(), q.log(), torch.tensor([0]))
    assert found["kl_teacher_student"].item() == pytest.approx(0.25 * np.log(2))
    assert found["nll_gap"].item() == pytest.approx(np.log(2))  # -ln .25 + ln .5
    assert found["top1_agreement"].item() == 0


def test_a_model_compared_with_itself_is_perfect(generator):
    logits = torch.randn(50, 9, generator=generator)
    found = fidelity(logits, logits, torch.arange(50) % 9)
    assert found["top1_agreement"].min() == 1
    for name in ("kl_teacher_student", "kl_student_teacher", "nll_gap"):
        assert found[name].abs().max() == 0


def test_calibration_error_hand_value():
    # four positions at confidence 0.75, three of them right: calibrated; one at 0.9, wrong
    sure, surer = [0.75, 0.25, 0.0], [0.9, 0.05, 0.05]
    logits = (torch.tensor([sure] * 4 + [surer]) + 1e-12).log()
    columns = calibration(Expectations(logits, logits, torch.tensor([0, 0, 0, 1, 1])))
    assert columns.shape == (5, 3 * ECE_BINS)
    assert expected_calibration_error(columns.sum(0).numpy()) == pytest.approx(0.9 / 5)


def test_sums_by_row():
    values = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert sum_by_row(values, [1, 0, 3]).tolist() == [1.0, 0.0, 9.0]


def coin(generator, seeds, rows, chance, spread=0.0):
    chances = chance + spread * generator.standard_normal((seeds, 1))
    hits = generator.random((seeds, rows)) < chances
    return Estimate(np.stack([hits, np.ones_like(hits)], axis=-1).astype(float))


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


def verdict(*comparison):
    return verdicts([compared(*comparison)])[0]


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
    arms = coin(generator, 5, 4000, first), coin(generator, 5, 4000, second)
    assert verdict("a beats b", metric, threshold, *arms)["result"] == result


def simulated(generator, seeds, rows, truth, between_seeds, between_rows=0.3, against=None):
    """Two arms whose rows and seeds vary as those of real runs do; the first is better by truth.
    The second may have another number of seeds; an arm of one seed is what that seed is."""
    row = between_rows * generator.standard_normal((1, rows))
    arms = []
    for better, count in ((truth, seeds), (0.0, against or seeds)):
        luck = between_seeds if count > 1 else 0.0
        level = better + luck * generator.standard_normal((count, 1))
        noise = between_rows * generator.standard_normal((count, rows))
        values = 0.5 + row + level + noise
        arms.append(Estimate(np.stack([values, np.ones_like(values)], axis=-1)))
    return compared("a beats b", "sequence_agreement", 0.0, *arms)


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
def test_where_one_seed_stands_for_an_arm_the_claim_is_about_that_seed(seeds, against):
    """The interval knows rows, and the seeds of an arm that has several; the line says so."""
    generator, beats = np.random.default_rng(seeds), 0
    with patch("gc.collect"):
        for _ in range(1000):
            found = verdicts([simulated(generator, seeds, 150, 0.0, 0.01, against=against)])[0]
            beats += found["result"] == "beats"
    assert "over 1 seed" in verdict_line(found) or "against one" in verdict_line(found)
    assert beats / 1000 <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_arms_as_far_apart_as_the_margin_match_in_at_most_5_percent_of_simulated_runs(seeds):
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


def test_a_claim_that_can_not_be_decided_says_how_many_seeds_would():
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
    arms = simulated(generator, 5, rows, truth, between_seeds=0.005)
    claim = compared("a matches b", "sequence_agreement", 0.05, arms.first, arms.second)
    found = verdicts([claim])[0]
    assert found["result"] == result
    assert "margin 5" in verdict_line(found)


@pytest.mark.parametrize(
    ("truth", "rows", "result"),
    [(0.0, 4000, "keeps"), (-0.1, 4000, "does not keep"), (-0.02, 20, "inconclusive")],
)
def test_a_share_is_kept_if_the_arm_beats_that_share_of_the_other(truth, rows, result):
    generator = np.random.default_rng(0)
    arms = simulated(generator, 5, rows, truth, between_seeds=0.005)
    claim = compared("a keeps b", "accuracy", 0.95, arms.first, arms.second)
    found = verdicts([claim])[0]
    assert found["result"] == result
    assert found["share"] == pytest.approx(arms.first.mean / arms.second.mean)
    assert found["share_ci95"][0] < found["share"] < found["share_ci95"][1]
    assert found["difference"] == pytest.approx(arms.first.mean - 0.95 * arms.second.mean)
    said = f"a keeps {100 * found['share']:.1f} % of the right answers of b ["
    assert verdict_line(found).startswith(said)
    assert "95 % needed: " + result.upper() in verdict_line(found)


def test_a_law_is_found_again_from_its_points():
    x = np.geomspace(1e3, 1e6, 7)
    noise = np.exp(0.01 * np.random.default_rng(0).standard_normal(7))
    falling = fit_law(x, (40 * x**-0.5 + 0.1) * noise)
    assert (falling.a, falling.b, falling.c) == pytest.approx((40, 0.5, 0.1), rel=0.15)
    assert falling.d == 0
    assert falling.minimum_at is None
    sizes = x / 1e6
    law = Law(0.002, 1.0, 0.3, 0.8)
    turning = fit_law(sizes, law(sizes) * noise, has_minimum=True)
    assert turning.minimum_at == pytest.approx(law.minimum_at, rel=0.15)
    assert law(np.array([0.5, 1, 2]) * law.minimum_at).argmin() == 1
    assert fit_law(x[:3], x[:3]) is None  # three points fit any law
    assert fit_law(x[:4], x[:4], has_minimum=True) is None


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


def test_the_verdict_line_says_it_in_words():
    arms = (coin(np.random.default_rng(i), s, 4000, c) for i, s, c in ((0, 5, 0.6), (1, 5, 0.4)))
    line = verdict_line(verdict("a beats b", "sequence_agreement", 0.0, *arms))
    assert re.fullmatch(
        r"a beats b by (19|20)\.\d points of agreement with teacher \[1\d\.\d, 2\d\.\d\] over "
        "5 seeds: BEATS",
        line,
    )
    one = coin(np.random.default_rng(0), 1, 400, 0.5)
    assert "over 1 seed (the interval is over rows alone)" in verdict_line(
        verdict("a beats b", "word_error_rate", 0.0, one, one)
    )


def test_what_would_hold_alone_but_not_among_all_claims_says_so():
    """Its interval lies above the threshold: without a word that reads like an error."""
    arms = [coin(np.random.default_rng(i), 5, 100, c) for i, c in ((0, 0.6), (1, 0.4))]
    found = verdict("a beats b", "sequence_agreement", 0.0, *arms)
    low = found["ci95"][0]
    assert low > 0
    unsure = {**found, "result": "inconclusive", "seeds_needed": 9}
    line = "significant alone, not after correction for all claims; 9 seeds would show"
    assert line in verdict_line(unsure)
    assert line not in verdict_line({**unsure, "threshold": low + 0.01})


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


# -- properties ------------------------------------------------------------------------------------


@st.composite
def metrics(draw, seeds=None):
    """Right answers of some seeds over 12 rows; in real runs as here, some rows may have none."""
    seeds = seeds or draw(st.integers(1, 4))
    rows = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), min_size=12, max_size=12)
    columns = draw(st.lists(rows, min_size=seeds, max_size=seeds))
    return Estimate(np.array(columns, dtype=float))


@given(metrics())
@settings(deadline=None, max_examples=30)
def test_an_interval_is_ordered_and_within_the_range_of_the_rows(metric):
    summary = metric.summary()
    low, high = summary["ci95"]
    assert low <= high
    assert summary["mean"] == pytest.approx(np.mean(summary["per_seed"]))
    if len(summary["per_seed"]) == 1:
        ratios = metric.columns[..., 0] / metric.columns[..., 1]
        assert ratios.min() - 1e-9 <= low <= high <= ratios.max() + 1e-9


@given(metrics(seeds=3), metrics(seeds=3))
@settings(deadline=None, max_examples=10)
def test_a_comparison_turned_round_is_its_mirror_image(first, second):
    there, back = (
        verdict("a beats b", "sequence_agreement", 0.0, *arms)
        for arms in ((first, second), (second, first))
    )
    assert there["difference"] == pytest.approx(-back["difference"], abs=1e-12)
    assert there["ci95"] == pytest.approx([-bound for bound in back["ci95"][::-1]], abs=1e-12)
    assert there["p_permutation"] == pytest.approx(back["p_permutation"])
    both = there["probability_of_improvement"] + back["probability_of_improvement"]
    assert both == pytest.approx(1)
    assert (there["result"], back["result"]) != ("beats", "beats")
    lower = verdict("a beats b", "word_error_rate", 0.0, first, second)
    assert lower["difference"] == pytest.approx(-there["difference"], abs=1e-12)


@given(st.lists(metrics(seeds=2), min_size=2, max_size=5))
@settings(deadline=None, max_examples=10)
def test_more_claims_never_make_one_of_them_surer(arms):
    claims = [compared("a beats b", "ece", 0.0, arms[0], arm) for arm in arms[1:]]
    together = verdicts(claims)
    for claim, found in zip(claims, together, strict=True):
        assert verdicts([claim])[0]["p_holm"] <= found["p_holm"] <= 1


# -- the committed results and the README ----------------------------------------------------------


def test_the_numbers_in_the_readme_equal_those_in_results():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = {match[2] for match in BLOCK.finditer(readme)}
    shown = {file.stem for file in (ROOT / "results").glob("*.json")} - {"trace-float64"}
    assert named == shown
    assert with_tables(readme, ROOT / "results") == readme


def test_a_changed_result_would_change_the_readme(tmp_path):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = [f for f in (ROOT / "results").glob("*.json") if f"results/{f.name} -->" in readme]
    assert len(shown) >= 5
    for file in shown:
        result = json.loads(file.read_text(encoding="utf-8"))
        next(iter(result["teacher"]["quality"].values()))["mean"] += 0.01
        (tmp_path / file.name).write_text(json.dumps(result), encoding="utf-8")
        assert with_tables(readme, tmp_path) != readme, file.name
        (tmp_path / file.name).unlink()


@pytest.mark.parametrize("file", sorted((ROOT / "results").glob("*.json")), ids=lambda f: f.name)
def test_a_committed_result_is_one_of_its_config(file):
    config = read_config(ROOT / "configs" / f"{file.stem}.yaml")
    stored = json.loads(file.read_text(encoding="utf-8"))["config"]
    assert other_configs(stored, config, ignored=()) == []
