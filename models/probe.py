"""Probe a model on one short row, in milliseconds, for everything that training, outputs and
evaluation rely on.

Each probe returns what is wrong, or None. `probe` raises the first problem as one line.
"""

import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import models.flops  # noqa: F401  its formulas count fused attention
from configs.schema import LabError
from models.generate import CachedForward
from models.language import (
    INNER,
    LARGE_VOCABULARY,
    ModelTask,
    linear_head,
    load_tokenizer,
    parameter_count,
)

LENGTH = 8  # tokens of the row
TOLERANCE = 1e-3  # of the largest logit; rounding errors of float32 are a thousand times smaller
HALF_TOLERANCE = 0.06  # the same in half precision, which has 3 digits or fewer
CONTEXT = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
PRODUCT = re.compile(r"(mm|matmul|bmm|conv|einsum|attention|linear)")


def probe(model: nn.Module, task: ModelTask, what: str, learns: bool = True) -> None:
    """LabError, beginning with `what`, for the first thing that does not hold. learns: whether the
    model will be trained."""
    training = model.training
    model.eval()
    names = PROBES if task.tokenizer is not None else OF_CLASSIFIERS
    for name in (name for name in names if learns or name not in OF_LEARNERS):
        reason = problem(name, model, task)
        if reason:
            raise LabError(f"{what}: {model.config.model_type} {reason}")
    model.train(training)


def problem(name: str, model: nn.Module, task: ModelTask) -> str | None:
    """What one probe finds wrong, or None. A model that cannot run at all is wrong, too."""
    try:
        return PROBES[name](model, task)
    except Exception as error:  # every architecture raises its own type
        reason = " ".join(str(error).split())[:200]
        return f"fails the probe {name!r} ({type(error).__name__}: {reason})"


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
    tolerance = HALF_TOLERANCE if a.dtype.itemsize < 4 else TOLERANCE
    largest = a[finite].abs().max()
    return bool(((a - b)[finite].abs() > tolerance * largest).any())


def tokenizer(model: nn.Module, task: ModelTask) -> str | None:
    """The tokenizer fits the model, and is the same after it was saved beside it."""
    mine = task.tokenizer
    embeddings = model.get_input_embeddings().num_embeddings
    largest = max(mine.get_vocab().values())
    if largest >= embeddings:
        return (
            f"has embeddings for {embeddings} tokens, but its tokenizer has ids up to {largest}; "
            "resize the model to its tokenizer"
        )
    if mine.eos_token_id is None:
        return "has a tokenizer without an EOS token: its answers could not end"
    with tempfile.TemporaryDirectory() as place:
        model.config.save_pretrained(place)
        mine.save_pretrained(place)
        saved = load_tokenizer(Path(place))
    for name, values in {
        "vocabulary": [t.get_vocab() for t in (mine, saved)],
        "special tokens": [[t.bos_token_id, t.eos_token_id, t.pad_token_id] for t in (mine, saved)],
        "encoding": [t("a b 1\n", add_special_tokens=True)["input_ids"] for t in (mine, saved)],
    }.items():
        if values[0] != values[1]:
            return f"comes back with another tokenizer when it is saved: its {name} differs"
    return None


def sizes(model: nn.Module, task: ModelTask) -> str | None:
    """No part of a model is far larger than its width, inner width and vocabulary say, which is how
    an ignored size shows."""
    config = model.config
    width, layers = config.hidden_size, config.num_hidden_layers
    inner = max(getattr(config, name, 0) or 0 for name in (*INNER, "hidden_size"))
    experts = max(getattr(config, name, 0) or 0 for name in EXPERTS)
    tables = 2 * (model.get_input_embeddings().num_embeddings + task.longest_row) * width
    expected = tables + layers * 8 * width * (width + (1 + experts) * max(inner, 4 * width))
    found = parameter_count(model)
    if found > expected:
        return (
            f"has {found:,} parameters, at most {expected:,} expected from its sizes; set the "
            "sizes that it ignores in model.settings"
        )
    return None


def shape_and_values(model: nn.Module, task: ModelTask) -> str | None:
    ids = row(model, task)
    logits = logits_of(model, ids)
    if logits.shape[-1] < task.vocabulary:
        return f"gives {logits.shape[-1]} logits, fewer than the {task.vocabulary} tokens"
    if bool(logits.isnan().any()) or bool((logits == torch.inf).any()):
        return "gives logits that are NaN or infinite"
    return None


def learnable(model: nn.Module, task: ModelTask) -> str | None:
    """Logits of -inf have no gradient."""
    if bool((logits_of(model, row(model, task)) == -torch.inf).any()):
        return "excludes tokens by logits of -inf, so it cannot learn them; use it unchanged"
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
    "tokenizer": tokenizer,
    "logits": shape_and_values,
    "learnable": learnable,
    "causal": causal,
    "cache": cached_generation,
    "head": head,
    "gradients": gradients,
    "positions": positions,
    "sizes": sizes,
    "FLOPs": counted,
}
OF_CLASSIFIERS = ("logits", "gradients", "FLOPs")
OF_LEARNERS = ("learnable", "gradients")
