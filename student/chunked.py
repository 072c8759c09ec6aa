"""Objectives over large vocabularies, a few positions at a time.

512 positions of 49,152 outcomes are 100 MB of float32, for the student and for the teacher, and
again for what a softmax keeps for its gradient. The states behind them are small: so logits are
made chunk by chunk, and made again when the gradient needs them (Chen et al. 2016,
arXiv 1604.06174).
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tasks.rows import Batch
from teacher.signal import Signal

LARGE = 8192  # outcomes, from where on logits are made in chunks
CHUNKS = 128  # an objective keeps up to twenty tensors of the size of one

Losses = Callable[[Tensor, Signal], Tensor]


class InChunks(torch.autograd.Function):
    """states [M, H], weight [V, H] and bias [V] of the last layer -> losses [M] nats."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        objective: Losses,
        signal: Signal,
        positions: int,
    ) -> Tensor:
        ctx.save_for_backward(states, weight, bias)
        ctx.told = objective, signal, positions
        pieces = [
            objective(nn.functional.linear(states[start:stop], weight, bias), part)
            for start, stop, part in chunks_of(signal, len(states), positions)
        ]
        return torch.cat(pieces)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """That of the weight is summed in one place: it is as large as some chunks of logits."""
        states, weight, bias = ctx.saved_tensors
        objective, signal, positions = ctx.told
        of_states, of_weight = torch.empty_like(states), torch.zeros_like(weight)
        of_bias = None if bias is None else torch.zeros_like(bias)
        for start, stop, part in chunks_of(signal, len(states), positions):
            logits = nn.functional.linear(states[start:stop], weight, bias).requires_grad_()
            with torch.enable_grad():
                losses = objective(logits, part)
            (of_logits,) = torch.autograd.grad(losses, logits, gradient[start:stop])
            torch.mm(of_logits, weight, out=of_states[start:stop])
            of_weight.addmm_(of_logits.T, states[start:stop])
            if bias is not None:
                of_bias += of_logits.sum(0)
        return of_states, of_weight, of_bias, None, None, None


def chunks_of(signal: Signal, count: int, positions: int) -> Iterator[tuple[int, int, Signal]]:
    """(start, stop, the signal there) of so many positions at a time."""
    for start in range(0, count, positions):
        stop = min(count, start + positions)
        yield start, stop, signal.part(start, stop)


def chunked(
    objective: Losses, states: Tensor, head: nn.Linear, signal: Signal, vocabulary: int
) -> Tensor:
    """objective(head(states), signal), [M] nats, in about CHUNKS parts: states [M, H]. Value and
    gradient are those of all at once; outcomes beyond the vocabulary pad the head."""
    weight, bias = head.weight, head.bias
    if len(weight) > vocabulary:
        weight, bias = weight[:vocabulary], None if bias is None else bias[:vocabulary]
    positions = max(1, len(states) // CHUNKS)
    return InChunks.apply(states, weight, bias, objective, signal, positions)


def losses_in_chunks(
    model: nn.Module, part: Batch, objective: Losses, signal: Signal, vocabulary: int
) -> Tensor:
    """The losses [M] of a transformers causal language model at the counted positions of a batch,
    without ever having all its logits."""
    ids = part.input_ids.to(model.device)
    states = model.base_model(ids, use_cache=False).last_hidden_state[part.counted]
    return chunked(objective, states, model.get_output_embeddings(), signal, vocabulary)
