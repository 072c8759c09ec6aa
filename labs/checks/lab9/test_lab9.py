"""Checks of lab 9. Each failure names the likeliest misconception by its signature."""

import numpy as np
import pytest

from labs.checks.tools import require_predictions

WORDS = np.array(
    "a bird can draw every fine green hat in just keen light many new old parts quite red small "
    "trees under very wide yellow zinc roofs".split()
)


@pytest.mark.points(2)
def test_tier_is_the_best_that_holds(lab):
    equal, other = {"student": "ab", "baseline": "cd"}, {"student": "ab", "baseline": "ce"}
    metrics = {"errors": 0.52, "agreement": 0.60}
    inside, outside = {"errors": (0.5, 0.54), "agreement": (0.6, 0.7)}, {"errors": (0.4, 0.51)}
    cases = {
        "equal hashes": (equal, equal, metrics, outside, "A"),
        "within all bands, ends included": (other, equal, metrics, inside, "C"),
        "one outside its band": (other, equal, metrics, inside | outside, "D"),
        "no bands": (other, equal, metrics, None, "?"),
        "equal hashes without bands": (equal, equal, metrics, None, "A"),
        "a model that is missing": ({"student": "ab"}, equal, metrics, inside, "C"),
    }
    for what, (*arguments, expected) in cases.items():
        found = lab.call("tier", *arguments)
        if what == "no bands" and found == "D":
            pytest.fail("tier: without bands nothing is known; D would be a judgement")
        assert found == expected, f"tier: {what}: found {found!r}, expected {expected!r}"


@pytest.mark.points(3)
def test_stale_numbers_are_found(lab, draw):
    result = {name: float(draw.uniform(0.2, 0.8)) for name in ("text", "logits", "hidden", "base")}
    digits = {name: int(draw.integers(0, 3)) for name in result}
    lines = {name: f"{100 * value:.{digits[name]}f}" for name, value in result.items()}
    report = "".join(f"- {name}: {text} % word errors\n" for name, text in lines.items())
    found = lab.call("stale", report, result)
    if found:
        pytest.fail("stale: a number is right if it is the share, rounded to the digits shown")
    changed = report.replace(
        f"- hidden: {lines['hidden']}", f"- hidden: {result['hidden'] * 90:.1f}"
    )
    assert lab.call("stale", changed, result) == ["hidden"], "stale: a changed number is not found"
    more = f"- forgotten: 12.3 % word errors\n{changed}"
    assert lab.call("stale", more, result) == ["forgotten", "hidden"], (
        "stale: a model that the result does not have"
    )


@pytest.mark.points(3)
def test_leaked_texts_share_thirteen_words(lab, draw):
    def text(count):
        return " ".join(draw.choice(WORDS, count))

    training = [text(60) for _ in range(20)]
    words = training[3].split()
    run = " ".join(words[10:23])
    test = [
        text(40),
        f"{text(10)} {run.upper().replace(' ', ', ')}! {text(10)}",
        f"{text(10)} 11 {' '.join(words[30:42])} 12 {text(10)}",
        " ".join(words[5:9]),
        "zebra",
    ]
    unchanged = [" ".join(words[7:30])]
    assert list(lab.call("leaked", training, unchanged)) == [0], (
        "leaked: a run of 23 words is missed"
    )
    assert list(lab.call("leaked", training, [f"zebra {' '.join(words[7:12])}"], 5)) == [0], (
        "leaked: the number of words is given"
    )
    found = lab.call("leaked", training, test)
    if 1 not in found:
        pytest.fail("leaked: case and punctuation make no difference")
    if 2 in found:
        pytest.fail("leaked: 12 words in a row are not 13")
    if 3 not in found:
        pytest.fail("leaked: a text shorter than 13 words has leaked if all of it stands there")
    assert list(found) == [1, 3], f"leaked: found {found}, expected [1, 3]"
    assert lab.call("leaked", ["many birds"], ["bird"]) == [], "leaked: a part of a word is no word"


@pytest.mark.points(2)
def test_untuned_methods_are_found(lab):
    fair = {"a": [(0.1, 0.5), (0.2, 0.4)], "b": [(0.1, 0.3), (0.2, 0.6)]}
    assert lab.call("untuned", fair, {"a": 0.2, "b": 0.1}) == []
    assert lab.call("untuned", fair, {"a": 0.2, "b": 0.2}) == ["b"], (
        "untuned: b runs at the rate that is best for a"
    )
    if lab.call("untuned", fair, {"a": 0.1, "b": 0.2}) == []:
        pytest.fail("untuned: the best try has the fewest errors")
    fewer = {**fair, "base": [(0.1, 0.5)]}
    assert lab.call("untuned", fewer, {"a": 0.2, "b": 0.1, "base": 0.1}) == ["base"], (
        "untuned: base had fewer tries"
    )


@pytest.mark.points(1)
def test_a_prediction_is_made_before_each_exercise_of_lab_9(lab):
    require_predictions(lab, "9.1", "9.2", "9.3", "9.4")
