"""Rows, their batches and their order."""

import numpy as np
import pytest
import torch

from configs.schema import LabError
from models.rows import Chunks, Rows, batch_order, collate, row_id


@pytest.fixture
def rows() -> Rows:
    lengths = [(2 + i % 5, 1 + i % 3) for i in range(100)]
    return Rows.build(
        [row_id(f"row {i}") for i in range(100)],
        [[1, *range(10, 9 + p)] for p, _ in lengths],
        [[*range(50, 49 + c), 2] for _, c in lengths],
    )


def test_arrays_are_read_as_if_they_were_one():
    whole = np.arange(100, 112)
    chunks = Chunks([whole[:5], whole[5:6], whole[6:]])
    assert len(chunks) == 12
    assert [chunks[place] for place in range(12)] == whole.tolist()
    for bounds in ((0, 5), (1, 4), (5, 6), (6, 12), (8, 9)):  # a row lies in one of them
        assert chunks[slice(*bounds)].tolist() == whole[slice(*bounds)].tolist()
    mixed = np.array([11, 0, 5, 4, 6, 0])
    assert chunks[mixed].tolist() == whole[mixed].tolist()


def test_counted_positions_predict_the_completion_and_nothing_else(rows):
    """Off by one, the first answer token is not supervised, or the last prompt token is."""
    batch = collate(rows, np.arange(20), pad=0)
    positions = batch.counted.sum(1).tolist()
    for i, predicted in enumerate(batch.targets.split(positions)):
        assert predicted.tolist() == rows.completion(i).tolist()
        assert batch.counted[i].nonzero()[0].item() == rows.prompt_lengths[i] - 1


def test_prompt_tokens_count_only_when_asked_and_with_their_weight(rows):
    batch = collate(rows, np.arange(20), pad=0, prompt_weight=0.1)
    for i, predicted in enumerate(batch.targets.split(batch.counted.sum(1).tolist())):
        assert predicted.tolist() == rows.row(i)[1:].tolist()
    assert batch.weights.sum().item() == pytest.approx(
        (rows.lengths - rows.prompt_lengths)[:20].sum() + 0.1 * (rows.prompt_lengths[:20] - 1).sum()
    )


def test_eos_is_supervised_even_where_it_is_the_padding_token(rows):
    batch = collate(rows, np.arange(20), pad=2)
    ends = [part[-1].item() for part in batch.targets.split(batch.counted.sum(1).tolist())]
    assert ends == [2] * 20


def test_an_epoch_reads_every_row_at_most_once_and_another_epoch_others(rows):
    order = batch_order(rows.lengths, 8, seed=3)
    epochs = [np.concatenate([order(e * 12 + s) for s in range(12)]) for e in range(2)]
    for epoch in epochs:
        assert len(set(epoch.tolist())) == 96
    assert epochs[0].tolist() != epochs[1].tolist()


def test_a_batch_is_a_pure_function_of_seed_and_step(rows):
    """So a run resumes without replaying or skipping data."""
    forwards = batch_order(rows.lengths, 8, seed=3)
    walked = [forwards(step).tolist() for step in range(40)]
    backwards = batch_order(rows.lengths, 8, seed=3)
    assert [backwards(step).tolist() for step in reversed(range(40))] == walked[::-1]
    assert batch_order(rows.lengths, 8, seed=4)(0).tolist() != walked[0]


def test_bucketing_leaves_little_padding():
    lengths = np.random.default_rng(0).integers(5, 30, 20_000)
    order = batch_order(lengths, 128, seed=0)
    batches = [lengths[order(step)] for step in range(order.per_epoch)]
    padded = sum(len(b) * b.max() for b in batches)
    assert padded < 1.03 * sum(b.sum() for b in batches)


def test_fewer_rows_than_a_batch_still_train(rows):
    assert len(batch_order(rows.lengths[:5], 8, seed=0)(7)) == 5


def test_take_keeps_rows_and_digest_sees_every_change(rows):
    some = rows.take(np.array([7, 3, 99]))
    assert [some.row(i).tolist() for i in range(3)] == [rows.row(i).tolist() for i in (7, 3, 99)]
    assert some.ids.tolist() == rows.ids[[7, 3, 99]].tolist()
    changed = Rows(rows.ids, rows.tokens + 1, rows.offsets, rows.prompt_lengths)
    assert rows.digest() == rows.take(np.arange(100)).digest() != changed.digest()


def test_ids_are_stable_across_machines_and_versions():
    assert row_id("pronounce distill") == 8779595228327891014


def test_a_row_of_no_tokens_or_no_prompt_is_rejected_by_its_id():
    for prompts, completions in (([[1], []], [[2], []]), ([[1], []], [[2], [3]])):
        with pytest.raises(LabError, match="row 8 is empty"):
            Rows.build([7, 8], prompts, completions)


def test_padding_never_reaches_the_loss(rows):
    """The same rows padded further give the same logits at counted positions, to the bit."""
    from configs.schema import Model
    from models.language import build_model, initialise
    from tasks.pronounce import build_tokenizer
    from tests.helpers import task_with

    small = Model(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = initialise(build_model(small, task_with(build_tokenizer(), 64)), seed=0).eval()
    batch = collate(rows, np.arange(8), pad=0)
    further = torch.nn.functional.pad(batch.input_ids, (0, 9), value=5)
    with torch.no_grad():
        near = model(batch.input_ids).logits[batch.counted]
        far = model(further).logits[:, : batch.input_ids.shape[1]][batch.counted]
    torch.testing.assert_close(near, far, rtol=0, atol=1e-6)


def test_a_row_may_be_a_prompt_of_one_token_and_nothing_else():
    assert Rows.build([7], [[1]], [[]]).lengths.tolist() == [1]
    with pytest.raises(LabError, match="row 7 is empty"):
        Rows.build([7], [[]], [[]])
