"""Checks of lab 6. Each failure names the likeliest misconception by its signature."""

import pytest

from labs.checks.tools import close, require_predictions


def problem(draw, steps):
    """A right trace, its steps and its answer."""
    value, found = int(draw.integers(46, 90)), []  # never below 0
    for _ in range(steps):
        operand = int(draw.integers(2, 10)) * (1 if draw.random() < 0.5 else -1)
        found.append([value, operand, value + operand])
        value += operand
    text = ";".join(f"{before}{operand:+d}={after}" for before, operand, after in found)
    return f"<think> {text} </think> {value}", found, value


@pytest.mark.points(3)
def test_read_gives_steps_and_answer(lab, draw):
    for steps in (1, 3, 5):
        text, expected, answer = problem(draw, steps)
        found = lab.call("read_trace", text)
        assert len(found) == 2, "read_trace: expected a pair, (steps, answer)"
        if None in found[0]:
            pytest.fail("read_trace: a right step is not read. Are `<think>` and spaces removed?")
        if found[0] == [[a, abs(b), c] for a, b, c in expected] != expected:
            pytest.fail("read_trace: the operand of a subtraction is negative")
        assert list(map(list, found[0])) == expected, "read_trace: other steps than expected"
        assert found[1] == answer, f"read_trace: the answer of {text!r} is {answer}"


@pytest.mark.points(2)
def test_read_survives_whatever_a_model_writes(lab):
    cases = {
        "<think> 7+5=12;12-3= </think> 9": ([[7, 5, 12], None], 9),
        "<think> 7+5=12;12-3=9": ([[7, 5, 12], [12, -3, 9]], None),
        "<think> </think> 4": ([], 4),
        "<think> 7+5=12 </think> pens": ([[7, 5, 12]], None),
        "<think> 7+5=12;12-3=9x </think> 9": ([[7, 5, 12], None], 9),
        "</think>": ([], None),
        "": ([], None),
    }
    for text, (steps, answer) in cases.items():
        found = lab.call("read_trace", text)
        if "</think>" not in text and found[1] is not None:
            pytest.fail("read_trace: a text without </think> has no answer, whatever its end is")
        stated = [None if step is None else list(step) for step in found[0]]
        assert (stated, found[1]) == (steps, answer), f"read_trace({text!r}): found {found}"


@pytest.mark.points(2)
def test_wrong_is_the_first_step_that_differs(lab, draw):
    _, expected, _ = problem(draw, 4)
    assert lab.call("first_wrong_step", expected, expected) is None
    for place in range(4):
        stated = [*expected]
        stated[place] = [*stated[place][:2], stated[place][2] + 1]
        found = lab.call("first_wrong_step", stated, expected)
        if found == place:
            pytest.fail("first_wrong_step: steps are counted from 1")
        assert found == place + 1, f"first_wrong_step: found {found}, expected {place + 1}"
    before, operand, _ = expected[1]
    copied = [before + 1, operand, before + 1 + operand]  # right arithmetic, a wrong number
    if lab.call("first_wrong_step", [expected[0], copied, *expected[2:]], expected) != 2:
        pytest.fail("first_wrong_step: a right step is the expected one, not one that adds up")
    assert lab.call("first_wrong_step", [*expected, None], expected) == 5, (
        "first_wrong_step: an extra step that cannot be read is wrong, too"
    )
    if lab.call("first_wrong_step", expected[:2], expected) is None:
        pytest.fail("first_wrong_step: a missing step is wrong, too; zip stops at the shorter list")
    assert lab.call("first_wrong_step", expected[:2], expected) == 3
    more = [*expected, [1, 2, 3]]
    assert lab.call("first_wrong_step", more, expected) == 5, "first_wrong_step: one step too many"
    assert lab.call("first_wrong_step", [None, *expected[1:]], expected) == 1


@pytest.mark.points(1)
def test_right_traces_are_those_with_the_right_answer(lab, draw):
    traces, answers = [], []
    for number in range(9):
        text, _, answer = problem(draw, 3)
        traces.append(text if number % 3 else text.partition("</think>")[0])
        answers.append(answer if number % 4 else answer + 1)
    traces += [traces[1], "<think> 1+1=3 </think> 7"]  # once more; a wrong step, a right answer
    answers += [answers[1], 7]
    expected = [n for n in range(9) if n % 3 and n % 4] + [9, 10]
    found = lab.call("right_traces", traces, answers)
    if set(found) == {*expected} - {9}:
        pytest.fail("right_traces: a trace that was sampled twice counts twice")
    if set(found) == {*expected} - {10}:
        pytest.fail("right_traces: only the answer decides")
    if list(found) == [n for n in range(9) if n % 4] + [9, 10]:
        pytest.fail("right_traces: a trace without an answer is kept")
    assert list(found) == expected, f"right_traces: found {found}, expected {expected}"


@pytest.mark.points(2)
def test_vote_is_the_most_frequent_answer(lab):
    cases = {
        (3, 5, 5): 5, (5, 3, 3, 5): 5, (0, 0, 5): 0, (None, None, 4): 4, (None, None): None,
        (): None, (7, None, None, None): 7,
    }  # fmt: skip
    for answers, expected in cases.items():
        found = lab.call("vote", list(answers))
        if found is None and None in answers and expected is not None:
            pytest.fail("vote: samples without an answer do not vote")
        assert found == expected, f"vote({list(answers)}): found {found}, expected {expected}"


@pytest.mark.points(1)
def test_vote_of_many_beats_one_above_a_half(lab, draw):
    for n in (1, 3, 9):
        p = float(draw.uniform(0.5, 0.9))
        votes = sum(
            p ** bin(word).count("1") * (1 - p) ** (n - bin(word).count("1"))
            for word in range(2**n)
            if bin(word).count("1") > n / 2
        )
        found = lab.call("chance_of_majority", p, n)
        assert close(float(found), votes), f"chance_of_majority({p:.3f}, {n}): not {votes:.4f}"


@pytest.mark.points(1)
def test_a_prediction_is_made_before_each_exercise_of_lab_6(lab):
    require_predictions(lab, "6.1", "6.2", "6.3", "6.4")
