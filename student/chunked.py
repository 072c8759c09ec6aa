"""Objectives over large vocabularies, a few positions at a time.

512 positions of 49,152 outcomes are 100 MB of float32, for the student and for the teacher, and
again for what a softmax keeps for its gradient. The states they come from are small: so logits are
computed chunk by chunk, and recomputed for the gradient (Chen et al. 2016, arXiv 1604.06174).
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from models.language import LARGE_VOCABULARY, LinearHead, autocast, linear_head, precise
from models.rows import Batch
from student.hidden import WithProjections, student_of
from teacher.signal import ComputedSignal, Signal

CHUNKS = 128  # an objective keeps up to twenty tensors as large as a chunk

LossFunction = Callable[[Tensor, Signal], Tensor]


class InChunks(torch.autograd.Function):
    """states [M, H], weight [V, H], bias [V] and scale of the head -> losses [M] nats. The matrix
    products have the type of the states."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: float,
        objective: LossFunction,
        signal: Signal | ComputedSignal,
        positions: int,
    ) -> Tensor:
        ctx.save_for_backward(states, weight, bias)
        ctx.options = scale, objective, signal, positions
        weight, bias = cast(weight, bias, states.dtype)
        pieces = [
            objective(scaled_logits(states[start:stop], weight, bias, scale), part)
            for start, stop, part in chunks_of(signal, len(states), positions)
        ]
        return torch.cat(pieces)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the weight is accumulated in place: it is as large as some chunks."""
        states, weight, bias = ctx.saved_tensors
        scale, objective, signal, positions = ctx.options
        states_grad, weight_grad = torch.empty_like(states), torch.zeros_like(weight)
        bias_grad = None if bias is None else torch.zeros_like(bias)
        weight, bias = cast(weight, bias, states.dtype)
        for start, stop, part in chunks_of(signal, len(states), positions):
            logits = scaled_logits(states[start:stop], weight, bias, scale).requires_grad_()
            with torch.enable_grad():
                losses = objective(logits, part)
            (logits_grad,) = torch.autograd.grad(losses, logits, gradient[start:stop])
            if scale != 1:
                logits_grad *= scale
            if bias is not None:
                bias_grad += logits_grad.sum(0)
            logits_grad = logits_grad.to(states.dtype)
            torch.mm(logits_grad, weight, out=states_grad[start:stop])
            if weight_grad.dtype == states.dtype:
                weight_grad.addmm_(logits_grad.T, states[start:stop])
            else:
                weight_grad += logits_grad.T @ states[start:stop]
        return states_grad, weight_grad, bias_grad, None, None, None, None


def scaled_logits(states: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """In float32 or more."""
    logits = precise(nn.functional.linear(states, weight, bias))
    return logits if scale == 1 else logits.mul_(scale)


def cast(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    return weight.to(dtype), None if bias is None else bias.to(dtype)


def chunks_of(
    signal: Signal | ComputedSignal, count: int, positions: int
) -> Iterator[tuple[int, int, Signal]]:
    """(start, stop, the signal there) for `positions` at a time."""
    for start in range(0, count, positions):
        stop = min(count, start + positions)
        yield start, stop, signal.part(start, stop)


def chunked(
    objective: LossFunction,
    states: Tensor,
    head: LinearHead,
    signal: Signal | ComputedSignal,
    vocabulary: int,
) -> Tensor:
    """objective(head(states), signal), [M] nats, in about CHUNKS chunks: states [M, H]. Value and
    gradient equal those of the unchunked computation; outcomes beyond the vocabulary are only
    padding of the head."""
    weight, bias = head.weight, head.bias
    if len(weight) > vocabulary:
        weight, bias = weight[:vocabulary], None if bias is None else bias[:vocabulary]
    positions = max(1, len(states) // CHUNKS)
    return InChunks.apply(states, weight, bias, head.scale, objective, signal, positions)


def pays(model: nn.Module, vocabulary: int) -> bool:
    """Whether chunks pay for a model: its vocabulary is large, and its logits are those of a linear
    head, which nothing changes afterwards."""
    if vocabulary < LARGE_VOCABULARY or getattr(model, "_forward_hooks", None):
        return False
    return linear_head(model) is not None


def losses_in_chunks(
    model: nn.Module,
    part: Batch,
    objective: LossFunction,
    signal: Signal | ComputedSignal,
    vocabulary: int,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Any]:
    """(the losses [M] of a causal language model at the counted positions of a batch, its output
    there) without holding all its logits. dtype: of the matrix products; None: that of the
    weights."""
    ids = part.input_ids.to(model.device)
    with autocast(ids.device, dtype):
        output = without_logits(model)(ids, use_cache=False)
    states = output.last_hidden_state[part.counted]
    states = states.to(dtype) if dtype else states
    head = linear_head(student_of(model))
    return chunked(objective, states, head, signal, vocabulary), output


def without_logits(model: nn.Module) -> Callable[..., Any]:
    """A forward pass that ends with the last hidden states."""
    if isinstance(model, WithProjections):
        return partial(model, logits=False)
    return model.base_model
