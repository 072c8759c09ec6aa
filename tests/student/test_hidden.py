"""Learning from hidden states: the losses, the projections, and their cost."""

import copy
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from configs.schema import Model, Recipe, value_at
from experiment.budget import affordable_steps
from experiment.cost import TrainingFlops
from models.language import build_model, initialise
from models.states import value_relation
from student.hidden import StudentOutput, WithProjections
from student.objectives import attention_kl, hidden_mse, value_relation_kl
from student.recipe import hidden_loss_of, objective_of
from tasks.pronounce import Pronounce
from teacher.signal import HiddenSignal, Signal


@pytest.fixture(scope="module")
def student():
    task = Pronounce(limit=100)
    shape = Model(hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    return initialise(build_model(shape, task), 0)


def student_at(projected=None, attention=None, relations=None):
    """A student at some positions."""
    return StudentOutput(None, projected, attention, relations)


def teacher_at(states=None, attention=None, relations=None):
    """A teacher at the same positions."""
    return HiddenSignal(states, attention, relations)


def test_hand_value():
    teacher = torch.tensor([[[-1.0, 1.0], [0.0, 2.0]]])
    found = hidden_mse(student_at(torch.tensor([[[0.0, 1.0], [0.0, 0.0]]])), teacher_at(teacher))
    assert found.tolist() == [(1 + 0 + 0 + 4) / 4]


def test_zero_and_without_gradient_at_the_teachers_own_states(generator):
    own = torch.randn(5, 2, 8, generator=generator).requires_grad_()
    loss = hidden_mse(student_at(own), teacher_at(own.detach()))
    loss.sum().backward()
    assert loss.tolist() == [0] * 5
    assert not own.grad.any()


def test_attention_hand_value():
    teacher = torch.tensor([[[0.75, 0.25], [1.0, 0.0]]])  # one position, two layers
    signal = teacher_at(attention=teacher)
    assert attention_kl(student_at(attention=teacher), signal).tolist() == [0.0]
    found = attention_kl(student_at(attention=torch.tensor([[[0.5, 0.5], [0.5, 0.5]]])), signal)
    expected = (0.75 * math.log(1.5) + 0.25 * math.log(0.5) + math.log(2)) / 2
    torch.testing.assert_close(found, torch.tensor([expected]), atol=1e-3, rtol=0)


def test_relation_hand_value():
    """Three positions, one head of two dimensions, the last two of them new: each is compared with
    those up to it, itself included."""
    values = torch.tensor([[[[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]]])
    found = value_relation(values, new=2)[0]
    scale = 2**0.5
    second = torch.softmax(torch.tensor([0.0, 4.0]) / scale, -1)
    third = torch.softmax(torch.tensor([1.0, 2.0, 2.0]) / scale, -1)
    torch.testing.assert_close(found, torch.stack([torch.cat([second, torch.zeros(1)]), third]))


def test_relations_are_matched_beside_attention_and_neither_sees_the_other():
    uniform, same = torch.tensor([[[0.5, 0.5]]]), torch.tensor([[[0.9, 0.1]]])
    student = student_at(attention=uniform, relations=same)
    teacher = teacher_at(attention=torch.tensor([[[0.75, 0.25]]]), relations=same)
    assert value_relation_kl(student, teacher).tolist() == [0.0]
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    found = attention_kl(student, teacher)
    torch.testing.assert_close(found, torch.tensor([expected]), atol=1e-3, rtol=0)


def test_relations_carry_a_gradient(student, generator):
    ids = torch.randint(1, 70, (3, 9), generator=generator)
    output = WithProjections(student, width=24, seed=0, relations=True)(ids)
    plain = WithProjections(student, width=24, seed=0)(ids)
    torch.testing.assert_close(output.logits, plain.logits)
    torch.testing.assert_close(output.attention, plain.attention)
    relations = output.relations
    torch.testing.assert_close(relations.sum(-1), torch.ones(3, 9, 2))
    assert not relations[:, 3, :, 4:].any()
    values = student.model.layers[1].self_attn.v_proj.weight
    (gradient,) = torch.autograd.grad(relations[:, :, 1].square().sum(), values)
    assert gradient.any()


def test_projections_have_the_precision_of_their_student(student, generator):
    ids = torch.randint(1, 70, (1, 4), generator=generator)
    double = WithProjections(copy.deepcopy(student).double(), width=24, seed=0)
    assert double(ids).projected.dtype == torch.float64
    assert WithProjections(student, width=24, seed=0)(ids).projected.dtype == torch.float32


def test_projections_do_not_change_the_logits(student, generator):
    ids = torch.randint(1, 70, (3, 9), generator=generator)
    output = WithProjections(student, width=24, seed=0)(ids)
    assert torch.equal(output.logits, student(ids, use_cache=False).logits)
    assert output.projected.shape == (3, 9, 2, 24)
    assert output.attention.shape == (3, 9, 2, 9)  # batch, position, layers, position
    torch.testing.assert_close(output.attention.sum(-1), torch.ones(3, 9, 2))
    assert not output.attention[:, 3, :, 4:].any()
    again = WithProjections(student, width=24, seed=0)(ids)
    assert torch.equal(output.projected, again.projected)
    assert not torch.equal(
        output.projected, WithProjections(student, width=24, seed=1)(ids).projected
    )


def test_the_ledger_charges_the_projections(student):
    plain = TrainingFlops(student).of_row(10)
    charged = TrainingFlops(WithProjections(student, width=24, seed=0)).of_row(10)
    per_token = 3 * 2 * 2 * 16 * 24  # forward and backward twice, 2 FLOPs, 2 layers of 16 x 24
    assert charged - plain == 10 * per_token
    with FlopCounterMode(display=False) as counter:
        output = WithProjections(student, width=24, seed=0)(torch.ones((4, 10), dtype=torch.long))
        (output.logits.sum() + output.projected.sum()).backward()
    assert counter.get_total_flops() == 4 * charged


def test_the_ledger_charges_relations_to_the_recipes_that_match_them(student):
    """Even if the same sizes were counted before without relations, in the same process."""
    without = TrainingFlops(WithProjections(student, width=24, seed=0)).of_row(10)
    model = WithProjections(student, width=24, seed=0, relations=True)
    charged = TrainingFlops(model).of_row(10)
    assert charged - without == 3 * 2 * 2 * 10 * 10 * 16  # as above: 2 layers, V V^T of 10 x 16
    assert TrainingFlops(WithProjections(student, width=24, seed=0)).of_row(10) == without


def test_hidden_losses_are_not_terms_over_the_vocabulary(generator):
    recipe = Recipe(
        access="hidden", outputs={"layers": [1]}, objective={"forward_kl": 0.8, "hidden_mse": 0.2}
    )
    assert hidden_loss_of(recipe) is not None
    assert hidden_loss_of(Recipe(access="logits")) is None
    logits = torch.randn(6, 9, generator=generator)
    signal = Signal(torch.zeros(6, dtype=torch.long), torch.log_softmax(logits.flip(0), -1))
    plain = objective_of(Recipe(access="logits", objective="forward_kl"))
    torch.testing.assert_close(
        objective_of(recipe)(logits, signal), 0.8 * plain(logits, signal), atol=0, rtol=1e-6
    )


@pytest.mark.parametrize("until", [0.5, 1.0])
def test_hidden_losses_are_annealed_and_charged_only_while_used(student, until):
    from models.rows import batch_order

    recipe = Recipe(
        access="hidden",
        outputs={"layers": [1, 2]},
        objective={
            "forward_kl": 0.5,
            "hidden_mse": {"start": 0.3, "end": 0, "until": until},
            "attention_kl": {"start": 0.2, "end": 0, "until": until / 2},
        },
    )
    hidden = hidden_loss_of(recipe)
    assert hidden.until == until
    assert hidden.steps(101) == -(-101 * until // 1)
    assert value_at(hidden.weights["hidden_mse"], 0.25) == pytest.approx(0.3 * (1 - 0.25 / until))
    assert value_at(hidden.weights["attention_kl"], until / 2) == 0.0
    assert value_at(hidden.weights["hidden_mse"], until / 2) > 0

    rows = Pronounce(limit=300).rows("train")
    model = WithProjections(student, width=24, seed=0)
    charged, plain = TrainingFlops(model), TrainingFlops(student)
    order = batch_order(rows.lengths, 32, 0)

    def cost(steps):
        costs = [charged if i / steps < until else plain for i in range(steps)]
        return sum(c.of_batch(rows.lengths[order(i)]) for i, c in enumerate(costs))

    budget = cost(40) + 1
    assert affordable_steps(charged, plain, rows.lengths, order, budget, hidden.steps) == 40
    assert affordable_steps(charged, plain, rows.lengths, order, budget - 2, hidden.steps) == 39


def test_maps_are_attention_and_then_relations_if_there_are_any():
    states = torch.zeros(5, 2, 8)  # positions, layers, width
    maps = torch.rand(5, 4, 9)
    both = HiddenSignal.of_maps(states, maps)
    assert torch.equal(both.attention, maps[:, :2])
    assert torch.equal(both.relations, maps[:, 2:])
    assert HiddenSignal.of_maps(states, maps[:, :2]).relations is None
