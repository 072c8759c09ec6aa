"""Rows: tokenised prompt -> completion pairs, addressed by id, and their training order."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from configs.schema import LabError

POOL_BATCHES = 32  # batches are cut from pools of this many, sorted by length, to avoid padding


def row_id(text: str) -> int:
    """A stable 63-bit id from a text: the same on every machine, in every order."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big") >> 1


class Chunks:
    """Arrays read as if they were one. They may be memory-mapped files: only what is indexed is
    copied, so that a million rows take no more memory than a thousand."""

    def __init__(self, arrays: list[np.ndarray]) -> None:
        self.arrays = arrays
        self.starts = np.cumsum([0, *map(len, arrays)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, places: np.ndarray | slice | int) -> np.ndarray:
        if isinstance(places, int | np.integer):
            return self[np.asarray([places])][0]
        if isinstance(places, slice):
            chunk = np.searchsorted(self.starts, places.start, side="right") - 1
            start = self.starts[chunk]  # a row lies in one shard
            return self.arrays[chunk][places.start - start : places.stop - start]
        chunks = np.searchsorted(self.starts, places, side="right") - 1
        found = np.empty(len(places), self.arrays[0].dtype)
        for chunk in np.unique(chunks):
            here = chunks == chunk
            found[here] = self.arrays[chunk][places[here] - self.starts[chunk]]
        return found


@dataclass(frozen=True)
class Rows:
    """N ragged rows. ids [N] int64; tokens [total]; offsets [N+1]; prompt_lengths [N].

    Row i is tokens[offsets[i]:offsets[i+1]]; its first prompt_lengths[i] tokens are the prompt.
    """

    ids: np.ndarray | Chunks
    tokens: np.ndarray | Chunks
    offsets: np.ndarray
    prompt_lengths: np.ndarray

    @classmethod
    def build(
        cls, ids: list[int], prompts: list[list[int]], completions: list[list[int]]
    ) -> "Rows":
        both = [p + c for p, c in zip(prompts, completions, strict=True)]
        return cls.build_flat(
            ids=np.asarray(ids, np.int64),
            tokens=np.asarray([token for row in both for token in row], np.int32),
            lengths=np.asarray([len(row) for row in both]),
            prompt_lengths=np.asarray([len(p) for p in prompts], np.int32),
        )

    @classmethod
    def build_flat(
        cls,
        ids: np.ndarray | Chunks,
        tokens: np.ndarray | Chunks,
        lengths: np.ndarray,
        prompt_lengths: np.ndarray,
    ) -> "Rows":
        empty = np.flatnonzero((lengths < 1) | (prompt_lengths < 1))
        if len(empty):
            raise LabError(
                f"row {ids[empty[0]]} is empty ({lengths[empty[0]]} tokens, "
                f"{prompt_lengths[empty[0]]} of them the prompt); remove it"
            )
        return cls(ids, tokens, np.concatenate([[0], np.cumsum(lengths)]), prompt_lengths)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets).astype(np.int32)

    def lengths_of(self, indices: np.ndarray) -> np.ndarray:
        """The lengths of some rows, without reading all."""
        return (self.offsets[indices + 1] - self.offsets[indices]).astype(np.int32)

    def row(self, i: int) -> np.ndarray:
        return self.tokens[self.offsets[i] : self.offsets[i + 1]]

    def prompt(self, i: int) -> np.ndarray:
        return self.tokens[self.offsets[i] : self.offsets[i] + self.prompt_lengths[i]]

    def completion(self, i: int) -> np.ndarray:
        return self.tokens[self.offsets[i] + self.prompt_lengths[i] : self.offsets[i + 1]]

    def in_prompt(self) -> np.ndarray:
        """[total]: which tokens belong to a prompt."""
        within = np.arange(self.offsets[-1]) - np.repeat(self.offsets[:-1], self.lengths)
        return within < np.repeat(self.prompt_lengths, self.lengths)

    def take(self, indices: np.ndarray) -> "Rows":
        lengths = self.lengths_of(indices)
        starts = np.concatenate([[0], np.cumsum(lengths)])
        within = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)
        tokens = self.tokens[np.repeat(self.offsets[indices], lengths) + within]
        return Rows(self.ids[indices], tokens, starts, self.prompt_lengths[indices])

    def digest(self) -> str:
        """sha256 over ids, tokens and boundaries: equal for equal rows."""
        digest = hashlib.sha256()
        for column in (self.ids, self.tokens, self.offsets, self.prompt_lengths):
            for array in column.arrays if isinstance(column, Chunks) else [column]:
                digest.update(np.ascontiguousarray(array).astype("<i8").tobytes())
        return digest.hexdigest()


@dataclass
class Batch:
    """Right-padded rows. ids [B]: ids of the rows; indices [B]: their indices in the rows they come
    from; input_ids [B, L]; positions [B, L]: whether another token of the row follows; counted
    [B, L]: whether the logits at t, which predict token t+1, count in the loss; targets [M]: the
    tokens to predict at the M counted positions; weights [M]: 1 for completion tokens, less for
    prompt tokens."""

    ids: np.ndarray
    indices: np.ndarray
    input_ids: torch.Tensor
    positions: torch.Tensor
    counted: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor


def collate(rows: Rows, indices: np.ndarray, pad: int, prompt_weight: float = 0.0) -> Batch:
    """Pad rows to the longest. The tokens of the completion are supervised, EOS included, and with
    a prompt_weight above 0 those of the prompt too, except the first. Attention is causal, so
    padding on the right needs no attention mask.
    """
    lengths = rows.lengths_of(indices)
    place = np.arange(int(lengths.max()))[None, :]
    filled = place < lengths[:, None]
    input_ids = np.full(filled.shape, pad, np.int64)
    input_ids[filled] = rows.take(indices).tokens
    answering = place >= rows.prompt_lengths[indices][:, None] - 1
    positions = place < lengths[:, None] - 1
    counted = positions & (answering | (prompt_weight > 0))
    targets = np.roll(input_ids, -1, axis=1)[counted]
    weights = np.where(answering, np.float32(1), np.float32(prompt_weight))[counted]
    arrays = (input_ids, positions, counted, targets, weights)
    return Batch(rows.ids[indices], indices, *(torch.from_numpy(array) for array in arrays))


def weight_of(rows: Rows, indices: np.ndarray, prompt_weight: float) -> tuple[float, int]:
    """(sum of the weights, number of positions that a token follows) of a batch, without building
    it: the denominators of a step that is computed in micro-batches."""
    lengths, prompts = rows.lengths_of(indices), rows.prompt_lengths[indices]
    completions = int((lengths - prompts).sum())
    weight = completions + prompt_weight * int((prompts - 1).sum())
    return weight, int((lengths - 1).sum())


def batch_order(lengths: np.ndarray, batch_rows: int, seed: int) -> Callable[[int], np.ndarray]:
    """A function from step number to row indices: pure in (seed, step), so that a run resumes
    without a saved sampler state.

    Every epoch is a new permutation. Pools of batches are sorted by length so that a batch needs
    little padding; the batches of a pool are shuffled again. The incomplete last batch of an epoch
    is dropped (different rows each time).
    """
    batch_rows = min(batch_rows, len(lengths))
    per_epoch = len(lengths) // batch_rows
    cached: dict[int, np.ndarray] = {}

    def epoch_plan(epoch: int) -> np.ndarray:
        generator = np.random.Generator(np.random.PCG64([seed, epoch]))
        order = generator.permutation(len(lengths))[: per_epoch * batch_rows].astype(np.int32)
        pools = []
        for pool in np.split(order, range(0, len(order), POOL_BATCHES * batch_rows)[1:]):
            batches = pool[np.argsort(lengths[pool], kind="stable")].reshape(-1, batch_rows)
            pools.append(generator.permutation(batches))
        return np.concatenate(pools)

    def at(step: int) -> np.ndarray:
        epoch, place = divmod(step, per_epoch)
        if epoch not in cached:
            cached.clear()
            cached[epoch] = epoch_plan(epoch)
        return cached[epoch][place]

    at.per_epoch = per_epoch
    return at
