"""Checks of lab 0. Each failure names the likeliest misconception by its signature."""

import pytest
import torch
from torch.nn import functional as F

from labs import distill
from labs.checks.tools import close, kl, normal, require_predictions


@pytest.mark.points(1)
def test_parameters_are_the_elements_of_all_tensors(lab, draw):
    width, layers = 8 * int(draw.integers(4, 15)), int(draw.integers(1, 5))
    model = distill.new_model(distill.Pronounce(limit=200), width, layers, seed=0)
    tensors = [*model.parameters()]
    found = lab.call("parameters", width, layers)
    if found == len(tensors):
        pytest.fail("parameters: tensors are counted, not their elements")
    if found == sum(tensor.numel() for tensor in model.state_dict().values()):
        pytest.fail("parameters: the embedding is the output layer, too, and counts once")
    assert found == sum(tensor.numel() for tensor in tensors), "parameters: another number"


@pytest.mark.points(1)
def test_words_are_every_nth(lab, draw):
    count, n = int(draw.integers(50, 90)), int(draw.integers(3, 9))
    found = lab.call("transfer_words", count, n)
    if len(found) == n:
        pytest.fail("transfer_words: every n-th word, not n words")
    assert list(found) == list(range(0, count, n)), "transfer_words: other places than expected"


@pytest.mark.points(2)
def test_mixed_loss_gives_the_share_to_the_teacher(lab, draw):
    logits, teacher = normal(draw, 6, 9), normal(draw, 6, 9).log_softmax(-1)
    targets = torch.from_numpy(draw.integers(0, 9, 6))
    temperature, share = float(draw.uniform(1.5, 3)), float(draw.uniform(0.6, 0.9))
    p, q = ((x / temperature).log_softmax(-1) for x in (teacher, logits))
    soft, hard = temperature**2 * kl(p, q).mean(), F.cross_entropy(logits, targets)
    found = lab.call("mixed_loss", logits, targets, teacher, temperature, share)
    signatures = {
        "the share is that of the dictionary": (1 - share) * soft + share * hard,
        "both terms have their full weight: this is a larger learning rate in disguise":
            soft + hard,
        "without the factor T^2": share * soft / temperature**2 + (1 - share) * hard,
        "the dictionary's term is not softened": share * soft + (1 - share) * F.cross_entropy(
            logits / temperature, targets),
    }  # fmt: skip
    for signature, wrong in signatures.items():
        if close(found, wrong):
            pytest.fail(f"mixed_loss: {signature}")
    assert close(found, share * soft + (1 - share) * hard), "mixed_loss: another value"


@pytest.mark.points(1)
def test_a_prediction_is_made_before_each_exercise_of_lab_0(lab):
    require_predictions(lab, "0.1", "0.2", "0.3")
