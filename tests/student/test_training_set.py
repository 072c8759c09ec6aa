"""What students and controls learn from."""

import numpy as np
import pytest
import torch

from configs.schema import LabError, Recipe
from models.rows import Rows, collate, row_id
from student.objectives import cross_entropy, forward_kl
from student.recipe import control_recipe
from student.training_set import lowest_ids, smoothed_labels, without_reasoning

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
    signal = smoothed_labels(V, entropy)(collate(rows, np.arange(10), 0)).whole()
    found = -(signal.log_probs.exp() * signal.log_probs).sum(-1)
    torch.testing.assert_close(found, torch.full_like(found, entropy), atol=1e-4, rtol=1e-4)
    assert signal.log_probs.argmax(-1).equal(signal.targets)


def test_without_smoothing_forward_kl_is_cross_entropy(rows, generator):
    batch = collate(rows, np.arange(10), 0)
    logits = torch.randn(len(batch.targets), V, generator=generator)
    signal = smoothed_labels(V, 0.0)(batch).whole()
    torch.testing.assert_close(
        forward_kl(logits, signal), cross_entropy(logits, signal), atol=1e-4, rtol=1e-4
    )


def test_low_data_rows_are_the_same_in_any_order_and_nested(rows):
    some = lowest_ids(rows, 0.2)
    assert len(some) == 10
    shuffled = rows.take(np.random.default_rng(0).permutation(50))
    assert set(lowest_ids(shuffled, 0.2).ids) == set(some.ids)
    assert set(lowest_ids(rows, 0.1).ids) < set(some.ids)


def test_a_control_takes_only_what_its_name_says_from_the_teacher():
    student = Recipe(temperature=0.5, outputs={"transfer_rows": 10})
    for name in ("baseline", "low_data", "smoothed"):
        assert control_recipe(name, student).access == "none"
    assert control_recipe("low_data", student).control.label_fraction == 0.05
    shuffled = control_recipe("shuffled", student)
    assert shuffled.control.shuffled
    assert shuffled.objective == student.objective
    assert shuffled.temperature == 0.5


def test_answers_are_kept_without_the_reasoning_before_them(rows):
    """The reasoning ends with token 21; a row without it has no answer."""

    class Reasons:
        def without_reasoning(self, tokens):
            return tokens[tokens.index(21) + 1 :] if 21 in tokens else None

    answered = [i for i in range(50) if 21 in rows.completion(i).tolist()]
    assert 0 < len(answered) < 50
    kept = without_reasoning(rows, Reasons())
    assert kept.ids.tolist() == rows.ids[answered].tolist()
    for place, i in enumerate(answered):
        assert kept.prompt(place).tolist() == rows.prompt(i).tolist()
        after = rows.completion(i).tolist()
        assert kept.completion(place).tolist() == after[after.index(21) + 1 :]
    none = rows.take(np.array([i for i in range(50) if i not in answered]))
    with pytest.raises(LabError, match="no row has an answer after its reasoning"):
        without_reasoning(none, Reasons())
