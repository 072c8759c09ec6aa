"""Checks of lab 1. Each failure names the likeliest misconception by its signature."""

import pytest
import torch

from labs.checks.tools import close, kl, normal, require_predictions

N, C = 6, 10


@pytest.mark.points(1)
def test_soften_gives_a_distribution_at_each_temperature(lab, draw):
    z = normal(draw, N, C, scale=3.0)
    for temperature in (0.5, 1.0, 4.0):
        found, expected = lab.call("soften", z, temperature), torch.softmax(z / temperature, -1)
        if found.shape != expected.shape:
            pytest.fail(f"soften: found shape {[*found.shape]}, expected {[*expected.shape]}")
        if close(found, torch.softmax(z * temperature, -1)) and temperature != 1:
            pytest.fail("soften: a higher temperature must flatten. Did you multiply by T?")
        if close(found, torch.softmax(z, -1) / temperature) and temperature != 1:
            pytest.fail("soften: the temperature divides the logits, before the softmax, not after")
        if close(found.sum(0), torch.ones(C)):
            pytest.fail("soften: each column sums to 1. Is your softmax over the examples?")
        assert close(found, expected), f"soften: other probabilities at T = {temperature:g}"


@pytest.mark.points(3)
def test_loss_is_the_divergence_of_the_teacher(lab, draw):
    student, teacher, t = normal(draw, N, C, scale=3.0), normal(draw, N, C, scale=3.0), 2.0
    p, q = (torch.log_softmax(z / t, -1) for z in (teacher, student))
    expected = t**2 * kl(p, q).mean()
    value, gradient, of_teacher, _ = lab.grad("distillation_loss", student, teacher, t)
    at_teacher = lab.call("distillation_loss", teacher, teacher, t)
    entropy = -(p.exp() * p).sum(-1).mean()
    signatures = {
        "averaged over the classes as well as over the examples: 10 times too small": expected / C,
        "summed over the examples, not averaged": expected * N,
        "T^2 is missing": expected / t**2,
        "one T is missing: the factor is T^2": expected / t,
        "the two are the wrong way round: KL(student || teacher)": t**2 * kl(q, p).mean(),
        "the temperature is missing in both": t**2 * kl(
            torch.log_softmax(teacher, -1), torch.log_softmax(student, -1)
        ).mean(),
    }  # fmt: skip
    for signature, wrong in signatures.items():
        if close(value, wrong):
            pytest.fail(f"distillation_loss: {signature}")
    if close(at_teacher, t**2 * entropy):
        pytest.fail(
            "distillation_loss: where the student equals the teacher it is the teacher's entropy, "
            "not 0. Is it a cross-entropy?"
        )
    assert abs(float(at_teacher)) < 1e-4, "distillation_loss: not 0 where both are equal"
    assert close(value, expected), f"distillation_loss: found {float(value):.4f}"
    assert gradient is not None, "distillation_loss: no gradient reaches the student"
    if of_teacher is not None and float(of_teacher.abs().max()) > 0:
        pytest.fail("distillation_loss: the teacher gets a gradient. Detach it.")


@pytest.mark.points(1)
def test_loss_keeps_its_gradient_at_high_temperature(lab, draw):
    student, teacher = normal(draw, N, C, scale=3.0), normal(draw, N, C, scale=3.0)
    sizes = []
    for t in (4.0, 16.0):
        _, gradient, *_ = lab.grad("distillation_loss", student, teacher, t)
        sizes.append(float(gradient.norm()))
    assert 0.5 < sizes[1] / sizes[0] < 2, (
        f"distillation_loss: from T = 4 to 16 the gradient becomes {sizes[1] / sizes[0]:.3f} times "
        "as large; with T^2 it hardly changes"
    )


@pytest.mark.points(2)
def test_doubles_are_the_likeliest_other_classes(lab, draw):
    labels = torch.from_numpy(draw.permutation([0, 1, 2, 3] * 12))
    probabilities = torch.softmax(normal(draw, 48, 4, scale=3.0), -1)
    expected = []
    for c in range(4):
        mean = probabilities[labels == c].mean(0)
        mean[c] = -1
        expected.append(int(mean.argmax()))
    found = lab.call("doubles", probabilities, labels)
    likeliest = [int(probabilities[labels == c].mean(0).argmax()) for c in range(4)]
    if [int(x) for x in found] == likeliest != expected:
        pytest.fail("doubles: the class itself is likeliest; leave it out")
    assert [int(x) for x in found] == expected


@pytest.mark.points(1)
def test_a_prediction_is_made_before_each_exercise(lab):
    require_predictions(lab, "1.1", "1.2", "1.3")
