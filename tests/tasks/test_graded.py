"""A small graded set for every task: right, near, far, empty and run-on answers, by hand."""

import numpy as np
import pytest

from tasks.digits import Digits
from tasks.gsm8k import final_number
from tasks.pronounce import Pronounce
from tasks.reason import Problem, Reason
from tasks.text import Text


@pytest.fixture(scope="module")
def pronounce():
    return Pronounce()


# `record` is listed as R AH K AO R D, R EH K ER D and R IH K AO R D.
# (word, answer, wrong, edits to the nearest listing, length of that listing)
PRONOUNCED = [
    ("lab", "L AE B", 0, 0, 3),
    ("lab", "L AH B", 1, 1, 3),
    ("lab", "L AE", 1, 1, 3),
    ("lab", "", 1, 3, 3),
    ("lab", "L AE B B B B", 1, 3, 3),
    ("lab", "Z IY", 1, 3, 3),
    ("record", "R AH K AO R D", 0, 0, 6),
    ("record", "R EH K ER D", 0, 0, 5),
    ("record", "R IH K AO R D", 0, 0, 6),
    ("record", "R EH K ER", 1, 1, 5),  # nearest: the listing of five
    ("record", "R IH K AO R", 1, 1, 6),
]


@pytest.mark.parametrize(("word", "answer", "wrong", "edits", "length"), PRONOUNCED)
def test_a_pronunciation_is_graded_by_its_nearest_listing(
    word, answer, wrong, edits, length, pronounce
):
    found = pronounce.grade(np.array([pronounce.id_of(word)]), [answer])
    values = [float(found[name][0]) for name in ("wrong", "edits", "length")]
    assert values == [wrong, edits, length]


def test_the_phoneme_error_rate_is_edits_by_the_phonemes_of_the_listings(pronounce):
    """9 edits in 3 + 3 + 5 phonemes; not the mean of rates, nor by the answers' lengths."""
    ids = np.array([pronounce.id_of(word) for word in ("lab", "lab", "record")])
    columns = pronounce.grade(ids, ["L AE B B B B", "", "Z Z R EH K ER D Z"])
    metric = pronounce.metrics["phoneme_error_rate"]
    total = columns[metric.numerator].sum() / columns[metric.denominator].sum()
    assert total == pytest.approx(9 / 11)


def test_the_first_listing_is_trained_and_all_are_shown(pronounce):
    word = "record"
    split = next(s for s, words in pronounce.by_split.items() if word in words)
    rows = pronounce.rows(split)
    i = pronounce.by_split[split].index(word)
    assert pronounce.render(rows.completion(i)) == pronounce.words[word][0]
    assert pronounce.truths(word) == ["R AH K AO R D", "R EH K ER D", "R IH K AO R D"]


@pytest.fixture(scope="module")
def reason():
    """A task with one known problem: 7+5-3, whose values are 12 and 9."""
    task = Reason(limit=100)
    problem = Problem(7, (5, -3), 0, (0, 0))
    task.by_id[1] = problem
    return task


# (answer, right, right steps of 2, sound, follows, faithful, first wrong step)
REASONED = [
    ("<think> 7+5=12;12-3=9 </think> 9", 1, 2, 1, 1, 1, None),
    ("<think> 7+5=12;12-3=8 </think> 8", 0, 1, 0, 1, 0, 2),
    ("<think> 7+5=12;12-3=9 </think> 8", 0, 2, 1, 0, 0, None),
    ("<think> 7+5=13;13-3=10 </think> 10", 0, 0, 0, 1, 0, 1),
    ("<think> 7+4=11;11-2=9 </think> 9", 1, 0, 1, 1, 1, 1),  # of another question
    ("<think> 7+5=12 </think> 9", 1, 1, 1, 0, 0, 2),
    ("<think> 7+5=12;12-3=9;9+1=10 </think> 10", 0, 2, 1, 1, 1, 3),
    ("<think> 7+5=12;13-3=10 </think> 10", 0, 1, 0, 1, 0, 2),  # does not go on
    ("<think> 7+5=12;12-3=9", 0, 2, 1, 0, 0, None),
    ("9", 1, 0, 0, 0, 0, 1),
    ("", 0, 0, 0, 0, 0, 1),
    ("<think> 7+5=12;12-3=9 </think> 99", 0, 2, 1, 0, 0, None),
    ("<think> 7+5=12;12-3=9 </think> 9 9 9", 0, 2, 1, 0, 0, None),
    ("<think> pens </think> 9", 1, 0, 0, 0, 0, 1),
]


@pytest.mark.parametrize(
    ("answer", "right", "steps", "sound", "follows", "faithful", "first"), REASONED
)
def test_a_solution_is_graded_step_by_step(
    answer, right, steps, sound, follows, faithful, first, reason
):
    found = reason.grade(np.array([1]), [answer])
    names = ("right", "right_steps", "sound", "follows", "faithful", "steps", "right_2")
    values = [float(found[name][0]) for name in names]
    assert values == [right, steps, sound, follows, faithful, 2, right]
    assert found["rows_1"][0] == found["right_1"][0] == found["rows_4_5"][0] == 0
    assert found["rows_2"][0] == 1
    from tasks.reason import first_wrong_step, read_solution

    assert first_wrong_step(read_solution(answer).steps, reason.by_id[1].steps) == first


def test_agreement_with_a_teacher_needs_an_answer(reason):
    """Two answers without a number do not agree; steps count in their place, by the teacher's."""
    answers = ["<think> 7+5=12;12-3=9 </think> 9", "", "<think> 12-3=9;7+5=12 </think> 9"]
    teachers = ["<think> 7+5=12;12-3=8 </think> 9", "", "<think> 7+5=12;12-3=9 </think> 9"]
    found = reason.agree(answers, teachers)
    assert found["same_answer"].tolist() == [1, 0, 1]
    assert found["same_steps"].tolist() == [1, 0, 0]
    assert found["teachers_steps"].tolist() == [2, 0, 2]


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("#### 18", 18), ("so 18", 18), ("#### 1,234.5", 1234.5), ("#### -3", -3), ("", None),
        ("none", None), ("3 then 4", 4), ("#### 3\n4", 3), ("x #### 3 #### 4", 3),
        ("#### $5 and 6", 6), ("10-3", 3),
    ],
)  # fmt: skip
def test_the_number_that_counts(answer, number):
    assert final_number(answer) == number


def test_a_digit_is_right_or_wrong():
    task = Digits(limit=200)
    rows = task.rows("heldout")
    label = task.truths("0")[0]
    other = str((int(label) + 1) % 10)
    ids = rows.ids[np.array([0, 0, 0])]
    assert task.grade(ids, [label, other, ""])["wrong"].tolist() == [0, 1, 1]


def test_the_bytes_of_a_row_are_those_of_its_text():
    """Multi-byte letters count by bytes, and the end mark has none."""
    task = Text(limit=120, vocabulary=300)
    rows = task.rows("heldout")
    for i in range(5):
        text = task.render(rows.completion(i))
        found = task.grade(rows.ids[np.array([i])], ["anything"])["bytes"]
        assert found.tolist() == [len(text.encode("utf-8"))]


def test_a_token_is_named_as_people_write_it(pronounce):
    assert pronounce.token_name(pronounce.tokenizer.convert_tokens_to_ids("AE")) == "AE"
    assert Digits.token_name(None, np.int64(7)) == "7"
    task = Reason(limit=100)
    assert task.token_name(task.token_ids["pens"]) == "pens"
