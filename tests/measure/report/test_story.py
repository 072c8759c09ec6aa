"""The story of a run: the first screen of its report."""

import json

import pytest

from measure.report.story import (
    cards,
    claims_about,
    conclusion,
    listed,
    shown_students,
    where_worse,
)
from tests.helpers import RESULTS, ROOT


@pytest.fixture
def quickstart() -> dict:
    return json.loads((ROOT / "results" / "quickstart.json").read_text(encoding="utf-8"))


@pytest.fixture
def methods() -> dict:
    return json.loads((ROOT / "results" / "methods.json").read_text(encoding="utf-8"))


def test_many_students_that_are_worse_share_a_line_per_metric(methods):
    (line,) = where_worse(methods)
    assert line.startswith("14 of 26 students are worse than baseline in agreement with teacher")
    assert line.endswith("on_policy (45.2) and total_variation (54.4)")


def test_of_many_students_the_story_shows_each_kind_of_access(methods):
    assert shown_students(methods) == ["forward_kl", "top_5", "sampled_12", "text", "states"]


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_every_committed_result_has_a_story(file):
    result = json.loads(file.read_text(encoding="utf-8"))
    story = cards(result)
    assert [card.name for card in story["teacher"]] == ["teacher"]
    assert 1 <= len(story["taught"]) <= 5
    assert all(card.closeness and card.share for card in story["taught"])
    assert all(line.endswith(".") for line in conclusion(result))


def test_cards_say_what_a_model_read_and_how_well_it_does(quickstart):
    entry = quickstart["students"]["text"]
    entry["quality"]["word_error_rate"]["mean"] = 0.5612
    entry["fidelity"]["sequence_agreement"]["mean"] = 0.59
    quickstart["cost"]["fraction_of_teacher_by_student"]["text"]["flops"] = 0.15
    text = cards(quickstart)["taught"][0]
    assert text.learns == "6,000 words: its answers, as a chat API returns them"
    assert (text.quality, text.closeness) == ("56.1 % word errors", "59.0 % agreement with teacher")
    assert text.share == "15.0 %"
    untaught = {card.name: card.learns for card in cards(quickstart)["untaught"]}
    assert untaught["baseline"] == "112,029 words of the data"


def test_the_conclusion_sorts_students_by_the_verdict_about_the_headline(quickstart):
    results = {"text": "worse", "logits": "not distinguished", "hidden": "better"}
    for verdict in quickstart["verdicts"]:
        name, _, other = verdict["claim"].split()
        if other == "baseline" and verdict["metric"] == "word_error_rate" and name in results:
            verdict["here"] = results[name]
    assert conclusion(quickstart)[1] == (
        "In this one run, in word errors, hidden is better than baseline; text is worse; logits is "
        "not distinguished."
    )
    for verdict in quickstart["verdicts"]:
        verdict |= {"seeds": 5, "here": None, "result": "better"}
    assert conclusion(quickstart)[1] == (
        "Over 5 seeds, in word errors, text, logits and hidden are better than baseline."
    )
    assert where_worse(quickstart) == []


def test_every_metric_in_which_a_student_is_worse_is_named(quickstart):
    reference, claims = claims_about(quickstart)
    assert reference == "baseline"
    for verdict in claims:
        worse = verdict["claim"].startswith("text ") and verdict["metric"] in (
            "ece",
            "word_error_rate",
        )
        verdict |= {"here": "worse" if worse else "better", "committed": None}
        if worse:
            verdict["difference"] = -0.02
    (line,) = where_worse(quickstart)
    assert line == "text is worse than baseline in word errors (2.0 points) and ECE (2.0 points)"


def test_a_list_in_words():
    assert listed([]) == ""
    assert listed(["a"]) == "a"
    assert listed(["a", "b"]) == "a and b"
    assert listed(["a", "b", "c"]) == "a, b and c"
