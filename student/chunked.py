"""Objectives over large vocabularies, a few positions at a time.

512 positions of 49,152 outcomes are 100 MB of float32, for the student and for the teacher, and
again for what a softmax keeps for its gradient. The states behind them are small: so logits are
made chunk by chunk, and made again when the gradient needs them (Chen et al. 2016,
arXiv 1604.06174).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tasks.rows import Batch
from teacher.signal import Signal

LARGE = 8192  # outcomes, from where on logits are made in chunks
CHUNK = 2**21  # logits at a time


def chunked(
    objective: Callable[[Tensor, Signal], Tensor],
    states: Tensor,
    head: Callable[[Tensor], Tensor],
    signal: Signal,
    positions: int,
) -> Tensor:
    """objective(head(states), signal), [M] nats, `positions` at a time: states [M, H], head
    [m, H] -> [m, V]. Value and gradient are those of all at once."""

    def losses(states: Tensor, start: int) -> Tensor:
        return objective(head(states), signal.part(start, start + len(states)))

    pieces = [
        checkpoint(losses, states[start : start + positions], start, use_reentrant=False)
        for start in range(0, len(states), positions)
    ]
    return torch.cat(pieces)


def losses_in_chunks(
    model: nn.Module,
    part: Batch,
    objective: Callable[[Tensor, Signal], Tensor],
    signal: Signal,
    vocabulary: int,
) -> Tensor:
    """The losses [M] of a transformers causal language model at the counted positions of a batch,
    without ever having all its logits."""
    ids = part.input_ids.to(model.device)
    states = model.base_model(ids, use_cache=False).last_hidden_state[part.counted]
    head = model.get_output_embeddings()
    positions = max(1, CHUNK // vocabulary)
    return chunked(objective, states, lambda some: head(some)[:, :vocabulary], signal, positions)
