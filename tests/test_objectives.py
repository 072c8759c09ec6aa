"""Properties of the objectives, against hand values and against torch."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import Recipe
from student.objectives import cross_entropy, forward_kl, generalised_jsd, reverse_kl
from student.recipe import objective_of
from teacher.signal import Signal

DIVERGENCES = [forward_kl, reverse_kl, generalised_jsd]
P, Q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.25, 0.5]])


def dense(logits: torch.Tensor, targets: torch.Tensor | None = None) -> Signal:
    targets = torch.zeros(len(logits), dtype=torch.long) if targets is None else targets
    return Signal(targets, torch.log_softmax(logits, -1))


def top_k(logits: torch.Tensor, k: int) -> Signal:
    top = torch.log_softmax(logits, -1).topk(k)
    return Signal(torch.zeros(len(logits), dtype=torch.long), top.values, top.indices)


def draw(generator, positions=7, outcomes=11):
    return torch.randn(positions, outcomes, generator=generator, dtype=torch.float64) * 2


def test_hand_values():
    signal = dense(P.log())
    # KL(p||q) = .5 ln 2 + 0 + .25 ln .5 = .25 ln 2, and the same backwards by symmetry
    assert forward_kl(Q.log(), signal).item() == pytest.approx(0.25 * math.log(2))
    assert reverse_kl(Q.log(), signal).item() == pytest.approx(0.25 * math.log(2))
    # m = (.375, .25, .375): JSD = .5 ln(4/3) + .25 ln(2/3) on either side
    jsd = 0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3)
    assert generalised_jsd(Q.log(), signal).item() == pytest.approx(jsd, rel=1e-5)
    assert cross_entropy(Q.log(), signal).item() == pytest.approx(math.log(4))


def test_forward_and_reverse_kl_equal_those_of_torch(generator):
    teacher, student = draw(generator), draw(generator)
    p, q = torch.log_softmax(teacher, -1), torch.log_softmax(student, -1)
    kl = torch.nn.functional.kl_div
    forward = kl(q, p, log_target=True, reduction="none").sum(-1)
    reverse = kl(p, q, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(forward_kl(student, dense(teacher)), forward)
    torch.testing.assert_close(reverse_kl(student, dense(teacher)), reverse)


def test_cross_entropy_equals_forward_kl_plus_entropy_for_a_certain_teacher(generator):
    student = draw(generator)
    targets = torch.arange(7)
    certain = Signal(targets, torch.nn.functional.one_hot(targets, 11).double().clamp(1e-30).log())
    torch.testing.assert_close(cross_entropy(student, certain), forward_kl(student, certain))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_zero_loss_and_zero_gradient_when_student_equals_teacher(
    divergence, temperature, generator
):
    teacher = draw(generator)
    student = (teacher + 3.0).clone().requires_grad_()  # logits may differ by a constant
    loss = divergence(student, dense(teacher), temperature=temperature)
    loss.sum().backward()
    assert loss.abs().max() < 1e-12
    assert student.grad.abs().max() < 1e-12


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_gradient_keeps_its_scale_as_temperature_rises(divergence, generator):
    """Without T^2 it would fall as 1 / T^2: by a factor of 64 at T = 8."""
    teacher, student = draw(generator) * 0.1, (draw(generator) * 0.1).requires_grad_()
    norms = []
    for temperature in (1.0, 8.0):
        (gradient,) = torch.autograd.grad(
            divergence(student, dense(teacher), temperature=temperature).sum(), student
        )
        norms.append(float(gradient.norm()))
    assert norms[1] == pytest.approx(norms[0], rel=0.2)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), k=st.integers(1, 10))
def test_top_k_with_a_tail_is_a_true_divergence_below_the_full_one(divergence, seed, k):
    generator = torch.Generator().manual_seed(seed)
    teacher, student = draw(generator), draw(generator)
    part = divergence(student, top_k(teacher, k))
    whole = divergence(student, dense(teacher))
    assert (part >= -1e-9).all()
    assert (part <= whole + 1e-6).all()


def test_top_k_of_all_outcomes_but_the_last_is_the_full_divergence(generator):
    teacher, student = draw(generator), draw(generator)
    torch.testing.assert_close(
        forward_kl(student, top_k(teacher, 10)), forward_kl(student, dense(teacher))
    )


def test_generalised_jsd_tends_to_the_kls_and_stays_below_log_2(generator):
    teacher, student = draw(generator), draw(generator)
    near_forward = generalised_jsd(student, dense(teacher), beta=1e-6) / 1e-6
    near_reverse = generalised_jsd(student, dense(teacher), beta=1 - 1e-6) / 1e-6
    torch.testing.assert_close(
        near_forward, forward_kl(student, dense(teacher)), rtol=1e-3, atol=1e-3
    )
    torch.testing.assert_close(
        near_reverse, reverse_kl(student, dense(teacher)), rtol=1e-3, atol=1e-3
    )
    assert (generalised_jsd(student, dense(teacher)) <= math.log(2)).all()


def test_a_mix_is_the_weighted_sum_of_its_terms(generator):
    teacher, student = draw(generator), draw(generator)
    signal = dense(teacher, torch.arange(7))
    mix = Recipe(objective={"forward_kl": 0.75, "cross_entropy": 0.25}, temperature=2)
    expected = 0.75 * forward_kl(student, signal, temperature=2) + 0.25 * cross_entropy(
        student, signal
    )
    torch.testing.assert_close(objective_of(mix)(student, signal), expected)


def test_text_has_no_distribution_and_top_k_no_temperature(generator):
    with pytest.raises(ValueError, match="text alone"):
        forward_kl(draw(generator), Signal(torch.arange(7)))
    with pytest.raises(ValueError, match="cannot be softened"):
        forward_kl(draw(generator), top_k(draw(generator), 3), temperature=2)
