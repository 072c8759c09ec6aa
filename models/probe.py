"""Probe a model on one short row, in milliseconds, for everything that training, outputs and
evaluation rely on.

Each probe returns what is wrong, or None. `probe` raises the first problem as one line.
"""

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from configs.schema import LabError
from models.generate import CachedForward
from models.language import LARGE_VOCABULARY, ModelTask, linear_head

LENGTH = 8  # tokens of the row
TOLERANCE = 1e-3  # of the largest logit; rounding errors are a thousand times smaller
CONTEXT = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
PRODUCT = re.compile(r"(mm|matmul|bmm|conv|einsum|attention|linear)")


def probe(model: nn.Module, task: ModelTask, what: str) -> None:
    """LabError, beginning with `what`, for the first thing that does not hold."""
    training = model.training
    model.eval()
    names = PROBES if task.tokenizer is not None else OF_CLASSIFIERS
    for name in names:
        reason = PROBES[name](model, task)
        if reason:
            raise LabError(f"{what}: {model.config.model_type} {reason}")
    model.train(training)


def row(model: nn.Module, task: ModelTask) -> Tensor:
    """[1, L] token ids, none of them padding; a classifier needs a whole row."""
    length = task.longest_row if task.tokenizer is None else min(LENGTH, task.longest_row)
    ids = torch.arange(length, device=model.device) * 7 % task.vocabulary
    return torch.where(ids == task.pad, (ids + 1) % task.vocabulary, ids)[None]


@torch.no_grad()
def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids, use_cache=False).logits


def differs(a: Tensor, b: Tensor) -> bool:
    """Whether logits differ beyond rounding; -inf equals -inf."""
    finite = torch.isfinite(a) & torch.isfinite(b)
    if bool((torch.isfinite(a) != torch.isfinite(b)).any()):
        return True
    largest = a[finite].abs().max()
    return bool(((a - b)[finite].abs() > TOLERANCE * largest).any())


def shape_and_values(model: nn.Module, task: ModelTask) -> str | None:
    ids = row(model, task)
    logits = logits_of(model, ids)
    if logits.shape[-1] < task.vocabulary:
        return f"gives {logits.shape[-1]} logits, fewer than the {task.vocabulary} tokens"
    if bool(logits.isnan().any()) or bool((logits == torch.inf).any()):
        return "gives logits that are NaN or infinite"
    return None


def causal(model: nn.Module, task: ModelTask) -> str | None:
    ids = row(model, task)
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % task.vocabulary
    before, after = (logits_of(model, each)[:, :-1] for each in (ids, changed))
    if differs(before, after):
        return (
            "is not causal: its logits change with later tokens, so it would read the answer; use "
            "a decoder"
        )
    return None


@torch.no_grad()
def cached_generation(model: nn.Module, task: ModelTask) -> str | None:
    ids = row(model, task)
    forward = CachedForward(model)
    half = ids.shape[1] // 2
    pieces = [forward(ids[:, :half]).logits[:, -1:]]
    pieces += [forward(ids[:, i : i + 1]).logits[:, -1:] for i in range(half, ids.shape[1])]
    if differs(logits_of(model, ids)[:, half - 1 :], torch.cat(pieces, 1)):
        return "generates other logits with a cache than in a full forward pass"
    return None


@torch.no_grad()
def head(model: nn.Module, task: ModelTask) -> str | None:
    """Logits of large vocabularies are computed from the head in chunks."""
    found = linear_head(model)
    if found is None or task.vocabulary < LARGE_VOCABULARY:
        return None
    ids = row(model, task)
    states = model.base_model(ids, use_cache=False).last_hidden_state
    if differs(logits_of(model, ids), found.logits(states)):
        return "does not compute its logits as its last hidden states times its head"
    return None


def gradients(model: nn.Module, task: ModelTask) -> str | None:
    model.zero_grad(set_to_none=True)
    model(row(model, task), use_cache=False).logits.float().square().sum().backward()
    unused = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    model.zero_grad(set_to_none=True)
    if unused:
        return f"never uses {len(unused)} of its parameters, such as {unused[0]}"
    return None


def positions(model: nn.Module, task: ModelTask) -> str | None:
    context = next((getattr(model.config, k) for k in CONTEXT if hasattr(model.config, k)), None)
    if context and context < task.longest_row:
        return f"has {context} positions, fewer than the {task.longest_row} tokens of a row"
    return None


class Uncounted(TorchDispatchMode):
    """Matrix products of a forward pass that FlopCounterMode does not count."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        name = function._schema.name.split("::")[-1]
        known = function._overloadpacket in flop_registry
        if PRODUCT.search(name) and not known:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def counted(model: nn.Module, task: ModelTask) -> str | None:
    with Uncounted() as seen:
        model(row(model, task), use_cache=False)
    if seen.names:
        return f"multiplies by {seen.names[0]}, which the FLOP counter does not count"
    return None


PROBES: dict[str, Callable[[nn.Module, ModelTask], str | None]] = {
    "logits": shape_and_values,
    "causal": causal,
    "cache": cached_generation,
    "head": head,
    "gradients": gradients,
    "positions": positions,
    "FLOPs": counted,
}
OF_CLASSIFIERS = ("logits", "gradients", "FLOPs")
