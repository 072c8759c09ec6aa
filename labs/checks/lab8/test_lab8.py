"""Checks of lab 8. Each failure names the likeliest misconception by its signature."""

import numpy as np
import pytest
import torch
from scipy import stats

from labs.checks.tools import close, normal, require_predictions


def lists(draw, vocabulary, share=0.25):
    """[V, V]: a random share of the tokens after each one."""
    count = int(share * vocabulary)
    rows = [draw.permutation(vocabulary) < count for _ in range(vocabulary)]
    return torch.from_numpy(np.stack(rows)).float()


@pytest.mark.points(1)
def test_mark_raises_green_tokens_and_stays_a_distribution(lab, draw):
    log_probs, green = normal(draw, 20).log_softmax(-1), lists(draw, 20)[3]
    bias = float(draw.uniform(1, 3))
    found = lab.call("marked", log_probs, green, bias)
    if close(found, log_probs + bias * green):
        pytest.fail("marked: the probabilities sum to more than 1; normalise them")
    if close(found, (log_probs + bias * (1 - green)).log_softmax(-1)):
        pytest.fail("marked: the other tokens are raised")
    if close(found, (log_probs.exp() + bias * green).log_softmax(-1)):
        pytest.fail("marked: the bias is added to logits, not to probabilities")
    assert close(found, (log_probs + bias * green).log_softmax(-1)), "marked: other values"


@pytest.mark.points(3)
def test_valid_z_is_that_of_a_random_key(lab, draw):
    vocabulary = 12
    counts = torch.from_numpy(draw.poisson(3, (vocabulary, vocabulary)) ** 2).float()
    green = lists(draw, vocabulary, 1 / 3)
    centred = counts - counts.mean(1, keepdim=True)
    top, square = (centred * green).sum(), centred.square().sum()
    factor, share = vocabulary / (vocabulary - 1), 2 / 9
    expected = float(top / (share * factor * square).sqrt())
    found = float(lab.call("z_of", counts, green))
    total = counts.sum()
    naive = float(((counts * green).sum() - total / 3) / (share * total).sqrt())
    columns = counts - counts.mean(0, keepdim=True)
    uncentred = float((counts * green).sum() / (share * factor * counts.square().sum()).sqrt())
    whole = counts - counts.mean()
    signatures = {
        "every token is counted as if it were independent": naive,
        "the means of the rows are not subtracted": uncentred,
        "V / (V - 1) is missing: lists are drawn without replacement":
            float(top / (share * square).sqrt()),
        "a third of the tokens is green here, not a quarter":
            float(top / (3 / 16 * factor * square).sqrt()),
        "this is the mean of every column, not of every row":
            float((columns * green).sum() / (share * factor * columns.square().sum()).sqrt()),
        "this is the mean of the whole table, not of every row":
            float((whole * green).sum() / (share * factor * whole.square().sum()).sqrt()),
    }  # fmt: skip
    for signature, wrong in signatures.items():
        if close(found, wrong) and not close(wrong, expected):
            pytest.fail(f"z_of: {signature}")
    assert close(found, expected), f"z_of: found {found:.4f}, expected {expected:.4f}"


@pytest.mark.hidden
@pytest.mark.points(1)
def test_valid_z_has_a_standard_deviation_of_one_over_keys(lab, draw):
    pairs = draw.integers(0, 24, (60, 2))  # a text that repeats itself
    counts = torch.zeros(24, 24)
    for first, second in pairs:
        counts[first, second] += int(draw.integers(1, 40))
    zs = [float(lab.call("z_of", counts, lists(draw, 24))) for _ in range(300)]
    assert 0.85 < np.std(zs) < 1.15, f"z_of: over random keys its spread is {np.std(zs):.2f}"


@pytest.mark.points(1)
def test_rank_counts_the_key_itself(lab, draw):
    others = draw.normal(size=99).tolist()
    assert lab.call("rank_p", 100.0, others) != 0, "rank_p: never 0: the true key is one of them"
    if close(lab.call("rank_p", 100.0, others), 1 / 99):
        pytest.fail("rank_p: K other keys and the true one are K + 1")
    assert close(lab.call("rank_p", 100.0, others), 0.01)
    assert close(lab.call("rank_p", -100.0, others), 1.0)
    tie = sorted(others)[50]
    if close(lab.call("rank_p", tie, others), (1 + 48) / 100):
        pytest.fail("rank_p: at least this z: a tie counts")
    assert close(lab.call("rank_p", tie, others), (1 + 49) / 100)


@pytest.mark.points(2)
def test_closer_is_a_prediction_for_one_more_student(lab, draw):
    innocent = draw.normal(0.1, 0.02, 8)
    student = float(innocent.mean() + draw.uniform(2, 4) * innocent.std(ddof=1))
    n, distance = 8, student - innocent.mean()
    expected = stats.t.sf(distance / (innocent.std(ddof=1) * (1 + 1 / n) ** 0.5), n - 1)
    found = float(lab.call("p_of_closeness", student, innocent.tolist()))
    signatures = {
        "this asks about the mean of the innocent students, not about one more":
            stats.t.sf(distance / (innocent.std(ddof=1) / n**0.5), n - 1),
        "the mean of 8 students is not exact either: 1 + 1/K":
            stats.t.sf(distance / innocent.std(ddof=1), n - 1),
        "the normal distribution is for many students":
            stats.norm.sf(distance / (innocent.std(ddof=1) * (1 + 1 / n) ** 0.5)),
        "the standard deviation divides by K, not by K - 1":
            stats.t.sf(distance / (innocent.std() * (1 + 1 / n) ** 0.5), n - 1),
        "this is two-sided; only closer is suspicious": 2 * expected,
        "this is the other tail": 1 - expected,
    }  # fmt: skip
    for signature, wrong in signatures.items():
        if close(found, wrong):
            pytest.fail(f"p_of_closeness: {signature}")
    assert close(found, expected), f"p_of_closeness: found {found:.5f}, expected {expected:.5f}"


def students(draw, taught, count):
    """Closeness to three candidates of students of one of them, of another teacher, or of nobody.
    Good students are close to all."""
    found = []
    for _ in range(count):
        quality = draw.normal(0, 0.1)
        values = {name: quality + draw.normal(0, 0.01) for name in "abc"}
        if taught in values:
            values[taught] += 0.15
        found.append(values)
    return found


@pytest.mark.points(2)
def test_trial_names_the_teacher(lab, draw):
    innocent = students(draw, "nobody", 12)
    right = {
        name: [lab.call("verdict", one, innocent) for one in students(draw, name, 6)]
        for name in "abc"
    }
    named = sum(verdict == name for name, found in right.items() for verdict in found)
    if all(verdict == "none" for found in right.values() for verdict in found):
        pytest.fail("verdict: it accuses nobody. Is what all good students share subtracted?")
    assert named >= 16, f"verdict: {named} of 18 students are attributed to their teacher"


@pytest.mark.hidden
@pytest.mark.points(2)
def test_trial_accuses_no_innocent_student(lab, draw):
    innocent = students(draw, "nobody", 12)
    others = students(draw, "nobody", 70)
    accused = [found for one in others if (found := lab.call("verdict", one, innocent)) != "none"]
    assert len(accused) <= 3, f"verdict: {len(accused)} of 70 innocent students are accused"


@pytest.mark.points(1)
def test_trial_corrects_for_the_number_of_candidates(lab, draw):
    innocent = students(draw, "nobody", 12)
    relative = [one["a"] - (one["b"] + one["c"]) / 2 for one in innocent]
    spread = np.std(relative, ddof=1) * (1 + 1 / 12) ** 0.5
    for p, message in ((0.0006, "is p corrected for three candidates?"), (0.01, "p is 0.01")):
        distance = np.mean(relative) + spread * stats.t.isf(p, 11)
        found = lab.call("verdict", {"a": float(distance), "b": 0.0, "c": 0.0}, innocent)
        assert found == "none", f"verdict: it accuses where it must not: {message}"


@pytest.mark.points(1)
def test_a_prediction_is_made_before_each_exercise_of_lab_8(lab):
    require_predictions(lab, "8.1", "8.2", "8.3", "8.4", "8.5")
