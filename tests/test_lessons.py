"""What students and controls learn from."""

import numpy as np
import pytest
import torch

from configs.schema import Recipe
from student.lessons import scarce, smoothed_labels
from student.objectives import cross_entropy, forward_kl
from student.recipe import control_recipe
from tasks.rows import Rows, collate, row_id

V = 60


@pytest.fixture
def rows() -> Rows:
    return Rows.build(
        [row_id(f"row {i}") for i in range(50)],
        [[1, *range(10, 12 + i % 4)] for i in range(50)],
        [[*range(20, 21 + i % 3), 2] for i in range(50)],
    )


@pytest.mark.parametrize("entropy", [0.0, 0.1, 0.5, 2.0])
def test_smoothed_labels_have_the_entropy_asked_for(entropy, rows):
    signal = smoothed_labels(V, entropy)(collate(rows, np.arange(10), 0))
    found = -(signal.log_probs.exp() * signal.log_probs).sum(-1)
    torch.testing.assert_close(found, torch.full_like(found, entropy), atol=1e-4, rtol=1e-4)
    assert signal.log_probs.argmax(-1).equal(signal.targets)


def test_without_smoothing_forward_kl_is_cross_entropy(rows, generator):
    batch = collate(rows, np.arange(10), 0)
    logits = torch.randn(len(batch.targets), V, generator=generator)
    signal = smoothed_labels(V, 0.0)(batch)
    torch.testing.assert_close(
        forward_kl(logits, signal), cross_entropy(logits, signal), atol=1e-4, rtol=1e-4
    )


def test_scarce_rows_are_the_same_in_any_order_and_nested(rows):
    some = scarce(rows, 0.2)
    assert len(some) == 10
    shuffled = rows.take(np.random.default_rng(0).permutation(50))
    assert set(scarce(shuffled, 0.2).ids) == set(some.ids)
    assert set(scarce(rows, 0.1).ids) < set(some.ids)


def test_controls_take_nothing_from_the_teacher_but_what_their_name_says():
    student = Recipe(temperature=0.5, transfer_rows=10)
    for name in ("alone", "scarce", "smoothed"):
        assert control_recipe(name, student).access == "none"
    assert control_recipe("scarce", student).label_fraction == 0.05
    shuffled = control_recipe("shuffled", student)
    assert shuffled.shuffled
    assert shuffled.objective == student.objective
    assert shuffled.temperature == 0.5
