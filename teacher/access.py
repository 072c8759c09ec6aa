"""The table ACCESS: what a teacher reveals, from a closed API to open weights.

Each level says what it reveals of the teacher's log-probabilities at M positions, how that is
stored per row, and how a batch of it is read back. To add a level, add an entry.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from configs.schema import Recipe
from models.generate import generator_on
from teacher.signal import Signal, tail_of

# What can be revealed, and what an objective can need (see OBJECTIVES):
# text          the tokens themselves
# samples       outcomes weighted by the teacher's probability: enough for an expectation
# outcomes      probabilities of some outcomes and of all others together
# distribution  the probability of every outcome: it can be softened and sorted
# states        hidden states and attention
# relations     value relations
FLOAT16_MAX = torch.finfo(torch.float16).max
TEXT = frozenset({"text"})
SAMPLES = TEXT | {"samples"}
OUTCOMES = SAMPLES | {"outcomes"}
DISTRIBUTION = OUTCOMES | {"distribution"}
WEIGHTS = DISTRIBUTION | {"states", "relations"}

Columns = dict[str, np.ndarray]  # what is stored of one row, or read of the rows of a batch
Pairs = dict[str, tuple[Tensor, Tensor]]  # {unit: (live, stored)}: what must agree


@dataclass(frozen=True)
class Access:
    """One level of access.

    meaning: what is revealed, for the report. reveal: (log_probs [M, V], targets [M], k, generator)
    -> Signal. store: (Signal, k, V) -> the `columns` of one row. read: (columns, targets [M], k) ->
    Signal of the rows of a batch, one after the other. compare: (Signal, log_probs [M, V] of the
    live teacher, k) -> what must agree. uses_k: whether it reads `outputs.k`. teacher: whether a
    teacher is used. sold: (k, V) -> how many log-probabilities an API that sells this shows at each
    token; None where no API does.
    """

    meaning: str
    reveals: frozenset[str]
    reveal: Callable[[Tensor, Tensor, int, torch.Generator], Signal]
    store: Callable[[Signal, int, int], Columns]
    read: Callable[[Columns, Tensor, int], Signal]
    columns: tuple[str, ...] = ()
    compare: Callable[[Signal, Tensor, int], Pairs] = lambda signal, live, k: {}
    uses_k: bool = False
    teacher: bool = True
    sold: Callable[[int, int], int] | None = None

    @property
    def probabilities(self) -> bool:
        """Whether probabilities are revealed."""
        return "samples" in self.reveals


def needs_outputs(recipe: Recipe) -> bool:
    """Whether a student of this recipe needs stored teacher outputs before it can train."""
    return ACCESS[recipe.access].teacher and recipe.sequences != "student"


# -- text ------------------------------------------------------------------------------------------


def reveal_text(log_probs: Tensor, targets: Tensor, k: int, generator: torch.Generator) -> Signal:
    return Signal(targets)


def store_text(signal: Signal, k: int, vocabulary: int) -> Columns:
    return {}


def read_text(columns: Columns, targets: Tensor, k: int) -> Signal:
    return Signal(targets)


# -- every log-probability -------------------------------------------------------------------------


def reveal_all(log_probs: Tensor, targets: Tensor, k: int, generator: torch.Generator) -> Signal:
    return Signal(targets, log_probs)


def store_all(signal: Signal, k: int, vocabulary: int) -> Columns:
    return {"log_probs": packed(signal.log_probs)}


def read_all(columns: Columns, targets: Tensor, k: int) -> Signal:
    return Signal(targets, torch.from_numpy(columns["log_probs"]).view(len(targets), -1))


def compare_all(signal: Signal, live: Tensor, k: int) -> Pairs:
    return {"nats": (live, signal.log_probs)}


# -- the k largest ---------------------------------------------------------------------------------


def reveal_top_k(log_probs: Tensor, targets: Tensor, k: int, generator: torch.Generator) -> Signal:
    top = log_probs.topk(k, dim=-1)
    return Signal(targets, top.values, top.indices, tail=tail_of(log_probs, top.indices))


def store_top_k(signal: Signal, k: int, vocabulary: int) -> Columns:
    return {
        "log_probs": packed(signal.log_probs),
        "indices": narrow(signal.indices.numpy().ravel(), vocabulary),
        "tail": packed(signal.tail),
    }


def read_top_k(columns: Columns, targets: Tensor, k: int) -> Signal:
    shape = (len(targets), k)
    log_probs = torch.from_numpy(columns["log_probs"]).view(shape)
    indices = torch.from_numpy(columns["indices"].astype(np.int64)).view(shape)
    return Signal(targets, log_probs, indices, tail=torch.from_numpy(columns["tail"]))


def compare_top_k(signal: Signal, live: Tensor, k: int) -> Pairs:
    return {
        "nats": (live.topk(k).values, signal.log_probs),
        "nats at the stored tokens": (live.gather(-1, signal.indices), signal.log_probs),
        "nats of the tail": (tail_of(live, signal.indices), signal.tail),
    }


# -- k draws ---------------------------------------------------------------------------------------


def reveal_sampled(
    log_probs: Tensor, targets: Tensor, k: int, generator: torch.Generator
) -> Signal:
    generator = generator_on(log_probs.device, generator)
    drawn = torch.multinomial(log_probs.exp(), k, replacement=True, generator=generator)
    weights = torch.full_like(drawn, 1 / k, dtype=log_probs.dtype)
    return Signal(targets, log_probs.gather(-1, drawn), drawn, weights)


def store_sampled(signal: Signal, k: int, vocabulary: int) -> Columns:
    """Many draws coincide, so each outcome is stored once per position, with its count."""
    drawn = signal.indices
    positions = len(drawn)
    place = torch.arange(positions)[:, None].expand_as(drawn)
    keys, counts = torch.unique(place * vocabulary + drawn, return_counts=True)
    rows, indices = keys // vocabulary, keys % vocabulary
    by_outcome = signal.log_probs.new_empty((positions, vocabulary))
    by_outcome.scatter_(-1, drawn, signal.log_probs)
    return {
        "log_probs": packed(by_outcome[rows, indices]),
        "indices": narrow(indices.numpy(), vocabulary),
        "counts": narrow(counts.numpy(), k + 1),
        "draws": narrow(torch.bincount(rows, minlength=positions).numpy(), k + 1),
    }


def read_sampled(columns: Columns, targets: Tensor, k: int) -> Signal:
    draws = torch.from_numpy(columns["draws"].astype(np.int64))
    filled = torch.arange(int(draws.max())) < draws[:, None]
    log_probs = torch.from_numpy(columns["log_probs"])
    indices = torch.from_numpy(columns["indices"].astype(np.int64))
    weights = torch.from_numpy(columns["counts"].astype(np.float32)) / k
    padded = (
        torch.zeros(filled.shape, dtype=values.dtype).masked_scatter(filled, values)
        for values in (log_probs, indices, weights)
    )
    return Signal(targets, *padded)


def compare_sampled(signal: Signal, live: Tensor, k: int) -> Pairs:
    drawn, total = signal.weights > 0, signal.weights.sum(-1)
    return {
        "nats": (live.gather(-1, signal.indices)[drawn], signal.log_probs[drawn]),
        "(sum of the weights)": (torch.ones_like(total), total),
    }


def packed(values: Tensor) -> np.ndarray:
    """Flattened, as float16 within its range; float64 is kept, for traces that must agree on every
    machine."""
    if values.dtype != torch.float64:
        values = values.clamp(-FLOAT16_MAX, FLOAT16_MAX).to(torch.float16)
    return values.numpy().ravel()


def narrow(values: np.ndarray, end: int) -> np.ndarray:
    """Integers from 0 to end - 1 in the smallest unsigned type."""
    return values.astype(np.min_scalar_type(end - 1))


LOG_PROBS = ("log_probs",)

ACCESS: dict[str, Access] = {
    # no teacher: for controls and for learning from rewards
    "none": Access("nothing", TEXT, reveal_text, store_text, read_text, teacher=False),
    "text": Access(
        "its answers, as a chat API returns them", TEXT, reveal_text, store_text, read_text,
        sold=lambda k, vocabulary: 0,
    ),
    "top_k": Access(
        "its answers with the k largest log-probabilities at each token, as some APIs return them",
        OUTCOMES, reveal_top_k, store_top_k, read_top_k, (*LOG_PROBS, "indices", "tail"),
        compare_top_k, uses_k=True, sold=min,
    ),
    # Anshumann et al. 2025, arXiv 2503.16870
    "sampled": Access(
        "its answers with k tokens drawn from its distribution at each token",
        SAMPLES, reveal_sampled, store_sampled, read_sampled,
        (*LOG_PROBS, "indices", "counts", "draws"), compare_sampled, uses_k=True,
    ),
    # Hinton et al. 2015, arXiv 1503.02531
    "logits": Access(
        "its answers with its whole distribution at each token",
        DISTRIBUTION, reveal_all, store_all, read_all, LOG_PROBS, compare_all,
        sold=lambda k, vocabulary: vocabulary,
    ),
    # Romero et al. 2014, arXiv 1412.6550
    "hidden": Access(
        "open weights: hidden states and attention too",
        WEIGHTS, reveal_all, store_all, read_all, LOG_PROBS, compare_all,
    ),
}  # fmt: skip
