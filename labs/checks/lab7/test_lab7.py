"""Checks of lab 7. Each failure names the likeliest misconception by its signature."""

import math
from collections import Counter

import numpy as np
import pytest

from labs.checks.tools import close, require_predictions

RATE = 0.05


@pytest.mark.points(2)
def test_again_only_what_can_succeed(lab, draw):
    gone = lab.call("seconds_to_wait", 429, {"x-should-retry": "false", "retry-after": "9"}, 0)
    if gone is not None:
        pytest.fail("seconds_to_wait: x-should-retry: false means that no try will succeed")
    for status in (400, 401, 403, 404, 422):
        found = lab.call("seconds_to_wait", status, {}, 0)
        assert found is None, f"seconds_to_wait: status {status} will be the same the next time"
    seconds = str(int(draw.integers(9, 60)))
    found = lab.call("seconds_to_wait", 429, {"retry-after": seconds}, 2)
    assert found == float(seconds), "seconds_to_wait: retry-after says how long to wait"
    for status in (408, 409, 429, 500, 503):
        waits = [lab.call("seconds_to_wait", status, {}, tries) for tries in range(6)]
        assert waits == [0.5, 1, 2, 4, 8, 8], f"seconds_to_wait: {waits} for status {status}"


@pytest.mark.points(2)
def test_budget_holds_whatever_the_answers_are(lab, draw):
    prompts = draw.integers(5, 40, 200).tolist()
    most, price_in, price_out = int(draw.integers(10, 80)), 0.1, 0.4
    costs = np.cumsum([(n * price_in + most * price_out) / 1e6 for n in prompts])
    place = int(draw.integers(20, 150))
    budget = float(costs[place]) * 1.0001
    found = lab.call("within_budget", prompts, most, price_in, price_out, budget)
    only_prompts = int((np.cumsum(prompts) * price_in / 1e6 <= budget).sum())
    if found in (0, 1) or found == 200:
        pytest.fail("within_budget: prices are per million tokens")
    if found == only_prompts != place + 1:
        pytest.fail("within_budget: the answers cost, too")
    if found == place + 2:
        pytest.fail("within_budget: the last one exceeds the budget")
    assert found == place + 1, f"within_budget: found {found}, expected {place + 1}"
    assert lab.call("within_budget", prompts, most, price_in, price_out, 1.0) == 200
    assert lab.call("within_budget", prompts, most, price_in, price_out, 1e-9) == 0
    dear = [10, 10_000, 10]
    if lab.call("within_budget", dear, 1, 1.0, 1.0, 25e-6) == 2:
        pytest.fail("within_budget: in order: stop at the first that does not fit")


@pytest.mark.points(1)
def test_entropy_of_topics_is_in_nats(lab, draw):
    topics = draw.integers(0, 7, 60).tolist()
    shares = np.array(list(Counter(topics).values())) / 60
    expected = float(-(shares * np.log(shares)).sum())
    found = float(lab.call("topic_entropy", topics))
    if close(found, expected / math.log(2)):
        pytest.fail("topic_entropy: in bits; use natural logarithms")
    if close(found, -expected):
        pytest.fail("topic_entropy: the sign is wrong")
    assert close(found, expected), f"topic_entropy: found {found:.3f}, expected {expected:.3f}"
    assert float(lab.call("topic_entropy", [3, 3, 3])) == 0


@pytest.mark.points(2)
def test_threshold_counts_the_new_account(lab, draw):
    scores = draw.normal(size=199).tolist()
    ordered = sorted(scores)
    found = lab.call("threshold", scores, 0.05)
    if found == ordered[math.ceil(199 * 0.95) - 1] != ordered[189]:
        pytest.fail("threshold: n + 1, not n: the new account is one of them")
    if found == ordered[199 - 190]:
        pytest.fail("threshold: in ascending order")
    if found == ordered[190]:
        pytest.fail("threshold: the place is counted from 1, and Python counts from 0")
    assert found == ordered[189], "threshold: not the score number 190 of 199"
    assert lab.call("threshold", scores[:50], 0.01) == math.inf, (
        "threshold: 50 accounts cannot promise 1 %; the threshold is infinite"
    )
    assert lab.call("threshold", scores[:99], 0.01) == max(scores[:99])


def honest(draw):
    """[second, prompt, topic] of a customer: 8,000 prompts, 20 to a topic."""
    kind, topics = int(draw.integers(4)), draw.choice(400, 6, replace=False)
    if kind == 0:  # chats
        prompts = draw.choice(topics[:4], 80) * 20 + draw.integers(0, 20, 80)
    elif kind == 1:  # application
        prompts = draw.choice(topics * 20 + draw.integers(0, 20, 6), 300)
    elif kind == 2:  # batch
        prompts = int(draw.integers(8000)) + np.arange(150)
    else:  # evaluation
        prompts = np.tile(draw.choice(8000, 60, replace=False), 4)
    times = np.sort(draw.uniform(0, 4 * 86400, len(prompts)))
    return [
        [float(t), int(p) % 8000, int(p) % 8000 // 20] for t, p in zip(times, prompts, strict=True)
    ]


def extractor(draw):
    count, days = ((1500, 1), (120, 4), (60, 4))[int(draw.integers(3))]
    prompts = draw.choice(8000, count, replace=False)
    times = np.sort(draw.uniform(0, days * 86400, count))
    return [[float(t), int(p), int(p) // 20] for t, p in zip(times, prompts, strict=True)]


def found_by(lab, draw):
    """(share of extractors that are found, share of new customers that are flagged)."""
    scores = [float(lab.call("score", honest(draw))) for _ in range(200)]
    limit = sorted(scores)[math.ceil(201 * (1 - RATE)) - 1]
    found = [float(lab.call("score", extractor(draw))) > limit for _ in range(40)]
    flagged = [float(lab.call("score", honest(draw))) > limit for _ in range(200)]
    return sum(found) / len(found), sum(flagged) / len(flagged)


@pytest.mark.points(2)
def test_find_half_of_the_extractors(lab, draw):
    found, flagged = found_by(lab, draw)
    if found < 0.05:
        pytest.fail("score: it finds no extractor. Is it higher for those, or lower? Batch jobs "
                    "never repeat a prompt either")  # fmt: skip
    assert found >= 0.5, f"score: it finds {found:.0%} of the extractors at {RATE:.0%} false alarms"
    assert flagged <= 0.15, f"score: {flagged:.0%} of new customers are flagged"


@pytest.mark.hidden
@pytest.mark.points(2)
def test_find_nine_of_ten_extractors(lab, draw):
    found, _ = found_by(lab, draw)
    assert found >= 0.9, f"score: it finds {found:.0%} of the extractors at {RATE:.0%} false alarms"


@pytest.mark.points(1)
def test_a_prediction_is_made_before_each_exercise_of_lab_7(lab):
    require_predictions(lab, "7.1", "7.2", "7.3", "7.4", "7.5")
