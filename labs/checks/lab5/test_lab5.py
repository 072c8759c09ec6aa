"""Checks of lab 5. Each failure names the likeliest misconception by its signature."""

import pytest
import torch

from labs.checks.tools import close, kl, normal, require_predictions


@pytest.mark.points(2)
def test_directions_are_two(lab, draw):
    student, teacher = normal(draw, 5, 8), normal(draw, 5, 8)
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    for name, right, wrong in (("forward_kl", kl(p, q), kl(q, p)),
                               ("reverse_kl", kl(q, p), kl(p, q))):  # fmt: skip
        found = lab.call(name, student, teacher)
        if close(found, wrong):
            pytest.fail(f"{name}: this is the other direction")
        if close(found, right.mean()) or close(found, right.sum()):
            pytest.fail(f"{name}: one value per row is expected, not their mean or sum")
        assert close(found, right), f"{name}: other values than expected"


@pytest.mark.points(3)
def test_bump_covers_or_seeks_a_mode(lab, draw):
    points = torch.linspace(-6, 6, 121)
    left, right = -2.5 + float(draw.uniform(-0.3, 0.3)), 2.5 + float(draw.uniform(-0.3, 0.3))
    bumps = [torch.exp(-0.5 * ((points - place) / 0.6) ** 2) for place in (left, right)]
    teacher = (0.5 * bumps[0] + 0.5 * bumps[1]).log()
    mean, width = lab.call("fit_bump", teacher, points, False, 1.0)
    middle = (left + right) / 2
    assert abs(mean - middle) < 0.4, f"fit_bump: forward KL ends at {mean:.2f}, not between"
    assert 2 < width < 3.5, f"fit_bump: with forward KL the width is {width:.2f}; it covers both"
    for start, place in ((-1.0, left), (1.0, right)):
        mean, width = lab.call("fit_bump", teacher, points, True, start)
        if abs(mean - middle) < 0.4 and width > 2:
            pytest.fail("fit_bump: with reverse=True it still fits the forward KL")
        assert abs(mean - place) < 0.4, f"fit_bump: reverse KL from {start:g} ends at {mean:.2f}"
        assert 0.4 < width < 0.9, f"fit_bump: with reverse KL the width is {width:.2f}"


@pytest.mark.points(3)
def test_sample_gradient_is_that_of_the_reverse_kl(lab, draw):
    student, teacher, count = normal(draw, 5, scale=1.0), normal(draw, 5, scale=1.0), 20_000
    generator = torch.Generator().manual_seed(int(draw.integers(2**31)))
    samples = torch.multinomial(student.softmax(-1), count, True, generator=generator)
    s = student.clone().requires_grad_()
    kl(s.log_softmax(-1), teacher.log_softmax(-1)).backward()
    expected = s.grad
    _, found, *_ = lab.grad("sampled_objective", student, teacher, samples)
    assert found is not None, "sampled_objective: no gradient reaches the student"
    size, error = float(expected.norm()), float((found - expected).norm())
    if float(found.norm()) < 0.25 * size:
        pytest.fail("sampled_objective: the gradient is about 0. Is it the plain average of "
                    "log q - log p?")  # fmt: skip
    if float((found + expected).norm()) < 0.25 * size:
        pytest.fail("sampled_objective: the gradient has the wrong sign")
    assert error < 0.25 * size, "sampled_objective: not the gradient of the reverse KL on average"


@pytest.mark.points(1)
def test_a_prediction_is_made_before_each_exercise_of_lab_5(lab):
    require_predictions(lab, "5.1", "5.2", "5.3")
