"""Properties of the objectives, against hand values and against torch."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import DivergenceSettings, Recipe
from student.objectives import (
    adaptive_kl,
    cross_entropy,
    forward_kl,
    generalised_jsd,
    reverse_kl,
    skewed_forward_kl,
    skewed_reverse_kl,
    total_variation,
    uld,
)
from student.recipe import objective_of
from teacher.access import ACCESS
from teacher.signal import Signal
from tests.expected import losses as expected_losses
from tests.helpers import DIVERGENCES as DIVERGENCES_OF_CONFIGS

KLS = [forward_kl, reverse_kl, generalised_jsd, skewed_forward_kl, skewed_reverse_kl]
DIVERGENCES = [*KLS, adaptive_kl, total_variation]
P, Q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.25, 0.5]])


def dense(logits: torch.Tensor, targets: torch.Tensor | None = None) -> Signal:
    targets = torch.zeros(len(logits), dtype=torch.long) if targets is None else targets
    return Signal(targets, torch.log_softmax(logits, -1))


def top_k(logits: torch.Tensor, k: int, stored_as: torch.dtype = torch.float64) -> Signal:
    targets = torch.zeros(len(logits), dtype=torch.long)
    live = ACCESS["top_k"].reveal(torch.log_softmax(logits, -1), targets, k, torch.Generator())
    return Signal(targets, live.log_probs.to(stored_as), live.indices, tail=live.tail.to(stored_as))


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
    # m = .1 p + .9 q = (.275, .25, .475)
    skewed = 0.5 * math.log(0.5 / 0.275) + 0.25 * math.log(0.25 / 0.475)
    assert skewed_forward_kl(Q.log(), signal).item() == pytest.approx(skewed, rel=1e-5)
    skewed = 0.25 * math.log(0.25 / 0.475) + 0.5 * math.log(0.5 / 0.275)  # m = (.475, .25, .275)
    assert skewed_reverse_kl(Q.log(), signal).item() == pytest.approx(skewed, rel=1e-5)
    assert total_variation(Q.log(), signal).item() == pytest.approx(0.25)
    # both have the same sizes, of other outcomes
    assert uld(Q.log(), signal).item() == pytest.approx(0, abs=1e-6)


def test_adaptive_kl_weighs_forward_kl_by_the_share_of_the_gap_in_the_head():
    p, q = torch.tensor([[0.6, 0.3, 0.1]]), torch.tensor([[0.5, 0.1, 0.4]])
    forward = 0.6 * math.log(0.6 / 0.5) + 0.3 * math.log(0.3 / 0.1) + 0.1 * math.log(0.1 / 0.4)
    reverse = 0.5 * math.log(0.5 / 0.6) + 0.1 * math.log(0.1 / 0.3) + 0.4 * math.log(0.4 / 0.1)
    for head, share in ((0.5, 0.1 / 0.6), (0.7, 0.3 / 0.6)):  # head {.6}, then {.6, .3}
        found = adaptive_kl(q.log(), dense(p.log()), head=head).item()
        assert found == pytest.approx(share * forward + (1 - share) * reverse, rel=1e-5)


def test_skewed_kls_are_bounded_where_the_plain_ones_explode():
    far = torch.tensor([[30.0, 0.0, 0.0]]), torch.tensor([[0.0, 30.0, 0.0]])
    for skewed, plain in ((skewed_forward_kl, forward_kl), (skewed_reverse_kl, reverse_kl)):
        assert plain(far[1], dense(far[0])).item() > 29
        assert skewed(far[1], dense(far[0])).item() <= -math.log(0.1) + 1e-5


def test_total_variation_is_symmetric_and_at_most_1(generator):
    teacher, student = draw(generator), draw(generator)
    there = total_variation(student, dense(teacher))
    torch.testing.assert_close(there, total_variation(teacher, dense(student)))
    assert (there <= 1).all()


def test_uld_depends_on_sorted_probabilities_only(generator):
    teacher = draw(generator)
    renamed = teacher[:, torch.randperm(11, generator=generator)]
    assert uld(renamed, dense(teacher)).abs().max() < 1e-12
    wider = torch.cat([teacher, torch.full((7, 5), -1e4)], dim=1)  # a larger vocabulary
    assert uld(wider, dense(teacher)).abs().max() < 1e-12
    assert uld(teacher, dense(wider)).abs().max() < 1e-12
    assert uld(draw(generator), dense(teacher)).min() > 0
    one, other = (torch.tensor([p]).log() for p in ([0.5, 0.3, 0.2], [0.2, 0.2, 0.6]))
    assert float(uld(one, dense(other))) == pytest.approx(0.1 + 0.1)


def sampled(logits: torch.Tensor, draws: int, generator: torch.Generator) -> Signal:
    """Every draw by itself: a repeated outcome stands there as often as it was drawn."""
    log_probs = torch.log_softmax(logits, -1)
    indices = torch.multinomial(log_probs.exp(), draws, replacement=True, generator=generator)
    weights = torch.full(indices.shape, 1 / draws, dtype=logits.dtype)
    targets = torch.zeros(len(logits), dtype=torch.long)
    return Signal(targets, log_probs.gather(-1, indices), indices, weights)


def test_sampled_forward_kl_is_right_in_expectation_in_value_and_gradient(generator):
    teacher, student = draw(generator, 1), draw(generator, 1)
    for few in (1, 12):
        many = student.expand(40_000, -1).clone().requires_grad_()
        loss = forward_kl(many, sampled(teacher.expand(40_000, -1), few, generator))
        loss.sum().backward()
        whole = student.clone().requires_grad_()
        forward_kl(whole, dense(teacher)).sum().backward()
        exact = forward_kl(student, dense(teacher))
        assert loss.mean().item() == pytest.approx(exact.item(), abs=0.05)
        torch.testing.assert_close(many.grad.mean(0), whole.grad[0], atol=0.01, rtol=0)


def test_a_sampled_student_equal_to_the_teacher_has_no_loss(generator):
    teacher = draw(generator)
    assert forward_kl(teacher, sampled(teacher, 5, generator)).abs().max() < 1e-12


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


@pytest.mark.parametrize("divergence", [*KLS, adaptive_kl])  # |p - q| has a kink there
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


@pytest.mark.parametrize("divergence", [*KLS, total_variation])  # f-divergences, all of them
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), k=st.integers(1, 10))
def test_top_k_with_a_tail_is_a_true_divergence_below_the_full_one(divergence, seed, k):
    generator = torch.Generator().manual_seed(seed)
    teacher, student = draw(generator), draw(generator)
    part = divergence(student, top_k(teacher, k))
    whole = divergence(student, dense(teacher))
    assert (part >= -1e-9).all()
    assert (part <= whole + 1e-6).all()


@pytest.mark.parametrize("divergence", [*KLS, total_variation])
@pytest.mark.parametrize("stored_as", [torch.float16, torch.bfloat16])
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), k=st.integers(1, 10), sure=st.sampled_from([1, 3, 10]))
def test_stored_top_k_is_still_a_distribution(divergence, stored_as, seed, k, sure):
    """The rest is small where the teacher is sure: what is left of it in rounded numbers must not
    decide. Divergences move by no more than the rounded log-probabilities themselves."""
    generator = torch.Generator().manual_seed(seed)
    teacher, student = sure * draw(generator), sure * draw(generator)
    exact, stored = top_k(teacher, k), top_k(teacher, k, stored_as)
    part, whole = divergence(student, stored), divergence(student, dense(teacher))
    off = max(
        float((a - b.double()).abs().max())
        for a, b in ((exact.log_probs, stored.log_probs), (exact.tail, stored.tail))
    )
    assert (part >= -1e-9).all()
    assert (part <= whole + 3 * off * (1 + whole) + 1e-6).all()
    assert (divergence(teacher, stored) <= 2 * off + 1e-6).all()


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
    soft, hard = forward_kl(student, signal, temperature=2), cross_entropy(student, signal)
    torch.testing.assert_close(objective_of(mix)(student, signal), 0.75 * soft + 0.25 * hard)
    plain = mix.model_copy(update={"divergence": DivergenceSettings(temperature_squared=False)})
    expected = 0.75 * soft / 4 + 0.25 * hard
    torch.testing.assert_close(objective_of(plain)(student, signal), expected)


def test_weights_and_temperature_follow_their_schedules(generator):
    teacher, student = draw(generator), draw(generator)
    signal = dense(teacher, torch.arange(7))
    fading = Recipe(
        objective={
            "forward_kl": {"start": 0.8, "end": 0, "until": 0.5},
            "cross_entropy": {"start": 0.2, "end": 1},
        },
        temperature={"start": 4, "end": 1},
    )
    for progress, soft, hard, temperature in (
        (0, 0.8, 0.2, 4),
        (0.25, 0.4, 0.4, 3.25),
        (1, 0, 1, 1),
    ):
        torch.testing.assert_close(
            objective_of(fading)(student, signal, progress),
            soft * forward_kl(student, signal, temperature) + hard * cross_entropy(student, signal),
        )


@pytest.mark.parametrize("name", DIVERGENCES_OF_CONFIGS)
def test_every_divergence_that_a_config_may_name_is_0_at_the_teacher(name, generator):
    teacher = draw(generator)
    objective = objective_of(Recipe(objective=name, temperature=2))
    assert objective(teacher, dense(teacher)).abs().max() < 1e-12
    assert objective(draw(generator), dense(teacher)).min() > 0


def test_text_has_no_distribution_and_top_k_no_temperature(generator):
    with pytest.raises(ValueError, match="only text"):
        forward_kl(draw(generator), Signal(torch.arange(7)))
    with pytest.raises(ValueError, match="cannot be softened"):
        forward_kl(draw(generator), top_k(draw(generator), 3), temperature=2)
    with pytest.raises(ValueError, match="cannot be softened"):
        forward_kl(draw(generator), sampled(draw(generator), 3, generator), temperature=2)
    with pytest.raises(ValueError, match="only estimate forward_kl"):
        reverse_kl(draw(generator), sampled(draw(generator), 3, generator))


@pytest.mark.parametrize(
    ("access", "name"),
    [
        *(("logits", name) for name in ("cross_entropy", *DIVERGENCES_OF_CONFIGS)),
        *(("top_k", name) for name in DIVERGENCES_OF_CONFIGS if name != "uld"),  # it sorts all
        ("sampled", "forward_kl"),
    ],
)
@pytest.mark.parametrize("squared", [True, False])
def test_a_second_implementation_gives_the_same_losses(name, access, squared, generator):
    """Two ways to the same number: torch and logarithms there, NumPy and probabilities here."""
    recipe = Recipe(
        access=access, objective=name, divergence={"temperature_squared": squared},
        temperature=2.5 if access == "logits" else 1.0,
    )  # fmt: skip
    teacher, student = (3 * torch.randn(9, 12, generator=generator).double() for _ in range(2))
    targets = torch.arange(9)
    signal = ACCESS[access].reveal(teacher.log_softmax(-1), targets, 4, generator)
    found = objective_of(recipe)(student, signal, 0.0)
    np.testing.assert_allclose(expected_losses(recipe, student.numpy(), signal), found, rtol=1e-9)
