"""The files of the outputs: what one shard holds, and all shards read as one.

A shard is an Arrow stream. One record is one row: its id, its tokens, how many of them are the
prompt, and what the access revealed, at the positions of the completion:

log_probs   nats at temperature 1: of all outcomes (logits, hidden), of the k likeliest (top_k), of
            those that were drawn (sampled)
indices     top_k, sampled: whose log-probabilities these are
tail        top_k: that of all the rest together
draws       sampled: how many outcomes a position has (they are k draws, most of them equal)
counts      sampled: how often each of them was drawn
hidden      hidden: the states after some layers, at all positions of the row but the last
attention   hidden: where it looked from there; then, if asked for, the relations of its values

Numbers are float16 or bfloat16, token ids and counts as narrow as they can be. Reading is
memory-mapped: a student touches only its batch.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from configs.runs import read_json
from configs.schema import LabError, Recipe
from tasks.rows import Batch, Chunks, Rows
from teacher.model import Forward
from teacher.signal import Inside, Signal, tail_of

TINY = 1e-8  # deviation that a dimension of the states has at least
HIDDEN_SAMPLE = 50_000  # positions that tell the mean and deviation of the states


@dataclass(frozen=True)
class Record:
    """One row and the columns of what the teacher revealed there, flat and packed: nothing wider is
    kept until its shard is written."""

    id: int
    tokens: np.ndarray
    prompt_length: int
    columns: dict[str, np.ndarray]


def write_shard(file: Path, records: Iterator[Record], forward: Forward, vocabulary: int) -> None:
    """One shard, and what it cost a counted teacher."""
    before = getattr(forward, "flops", 0.0)
    ids, prompts, lists, tokens = [], [], {"tokens": []}, 0
    for record in records:
        tokens += len(record.tokens) - record.prompt_length
        ids.append(record.id)
        prompts.append(record.prompt_length)
        lists["tokens"].append(narrow(record.tokens, vocabulary))
        for name, values in record.columns.items():
            lists.setdefault(name, []).append(values)
    columns = {"id": pa.array(ids, pa.int64()), "prompt_length": pa.array(prompts, pa.int32())}
    columns |= {name: ragged(arrays) for name, arrays in lists.items()}
    cost = {"flops": repr(getattr(forward, "flops", 0.0) - before), "tokens": str(tokens)}
    table = pa.table(columns).combine_chunks().replace_schema_metadata(cost)
    partial = file.with_name(f".{file.name}.partial")
    with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    with open(partial, "rb") as written:
        os.fsync(written.fileno())  # or a power cut may leave the name without the content
    os.replace(partial, file)


def revealed(
    log_probs: Tensor | None,
    recipe: Recipe,
    generator: torch.Generator,
    hidden: Tensor | None = None,
    attention: Tensor | None = None,
) -> dict[str, np.ndarray]:
    """No more of a row than the access of the recipe reveals, as columns: from log_probs
    [completion, V], hidden [row - 1, layers, W], attention [row - 1, layers, row - 1]."""
    number_format = getattr(torch, recipe.stored_as)
    if recipe.access == "text":
        return {}
    vocabulary = log_probs.shape[-1]
    if recipe.access == "top_k":
        top = log_probs.topk(recipe.k, dim=-1)
        return {
            "log_probs": packed(top.values, number_format),
            "indices": narrow(top.indices.numpy().ravel(), vocabulary),
            "tail": packed(tail_of(log_probs, top.indices), number_format),
        }
    if recipe.access == "sampled":
        chances = log_probs.exp()
        drawn = torch.multinomial(chances, recipe.k, replacement=True, generator=generator)
        place = torch.arange(len(drawn))[:, None].expand_as(drawn)
        keys, counts = torch.unique(place * vocabulary + drawn, return_counts=True)
        rows, indices = keys // vocabulary, keys % vocabulary
        return {
            "log_probs": packed(log_probs[rows, indices], number_format),
            "indices": narrow(indices.numpy(), vocabulary),
            "counts": narrow(counts.numpy(), recipe.k + 1),
            "draws": narrow(torch.bincount(rows, minlength=len(drawn)).numpy(), recipe.k + 1),
        }
    columns = {"log_probs": packed(log_probs, number_format)}
    if recipe.access == "hidden":
        columns["hidden"] = packed(hidden, number_format)
        columns["attention"] = packed(attention, number_format)
    return columns


def narrow(values: np.ndarray, end: int) -> np.ndarray:
    """Integers from 0 to end - 1 in as few bytes as they need."""
    return values.astype(np.min_scalar_type(end - 1))


def packed(values: Tensor, number_format: torch.dtype) -> np.ndarray:
    """Flat; Arrow has no bfloat16, its bits go as integers. float64 stays what it is, for traces
    that must agree on every machine."""
    values = values if values.dtype == torch.float64 else values.to(number_format)
    values = values.view(torch.int16) if values.dtype == torch.bfloat16 else values
    return values.numpy().ravel()


def numbers(values: np.ndarray) -> Tensor:
    """What `packed` packed."""
    tensor = torch.from_numpy(values)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.int16 else tensor


def ragged(arrays: list[np.ndarray]) -> pa.LargeListArray:
    offsets = np.concatenate([[0], np.cumsum([len(array) for array in arrays])])
    return pa.LargeListArray.from_arrays(offsets, pa.array(np.concatenate(arrays)))


def read_shard(file: Path) -> pa.Table:
    """A shard, memory-mapped. LabError if it is none of ours, whatever its hash."""
    try:
        table = pa.ipc.open_stream(pa.memory_map(str(file))).read_all()
        table.validate()
        table.select(["id", "prompt_length", "tokens"])
        if any(column.num_chunks != 1 or column.null_count for column in table.columns):
            raise ValueError("a column is in pieces, or has gaps")
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise LabError(
            f"{file} is no shard of outputs ({' '.join(str(error).split())[:100]}); delete "
            f"{file.parent} and run train.py on the config again"
        ) from None
    return table


def check_binding(folder: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """LabError naming what differs, when outputs are not those that this training needs."""
    for key in dict.fromkeys([*expected, *found]):
        value = expected.get(key, "nothing")
        if found.get(key, "nothing") != value:
            raise LabError(
                f"{folder} was made with another {key} ({str(found.get(key))[:16]}, expected "
                f"{str(value)[:16]}); delete that folder and run train.py on the config again"
            )


class Outputs:
    """A folder of outputs, open for reading: `rows`, and the `signal` at the rows of a batch."""

    def __init__(self, folder: Path, binding: dict[str, Any] | None = None) -> None:
        """LabError if a shard is missing or damaged, or if the outputs are bound to other things
        than `binding` says."""
        provenance = read_json(folder / "provenance.json")
        if not isinstance(provenance, dict) or not all(
            isinstance(provenance.get(key, 0), kind)
            for key, kind in (("binding", dict), ("shards", dict | None))
        ):
            raise LabError(
                f"{folder / 'provenance.json'} is damaged; delete {folder} and run train.py on the "
                "config again"
            )
        if binding is not None:
            check_binding(folder, provenance["binding"], binding)
        tables = []
        for name, digest in (provenance["shards"] or {}).items():
            file = folder / name
            if file.is_symlink() or file.parent != folder or Path(name).name != name:
                raise LabError(f"{folder}: {name!r} is not a file of this folder; delete it")
            if not file.exists() or sha256_of_file(file) != digest:
                raise LabError(
                    f"{file} is {'damaged' if file.exists() else 'missing'}; delete {folder} and "
                    "run train.py on the config again"
                )
            tables.append(read_shard(file))
        if not tables:
            raise LabError(f"{folder} is not finished; run train.py on the config to go on")
        self.k = provenance["binding"].get("k")
        self.layers = len(provenance["binding"].get("hidden_layers", []))
        self.maps = self.layers * (2 if provenance["binding"].get("relations") else 1)
        tokens = [flat(table, "tokens") for table in tables]
        self.rows = Rows.build_flat(
            ids=Chunks([table["id"].chunk(0).to_numpy() for table in tables]),
            tokens=Chunks([values for values, _ in tokens]),
            lengths=np.concatenate([np.diff(offsets) for _, offsets in tokens]),
            prompt_lengths=np.concatenate([table["prompt_length"].to_numpy() for table in tables]),
        )
        self.shard_starts = np.cumsum([0, *(len(table) for table in tables)])
        names = ("log_probs", "indices", "tail", "draws", "counts", "hidden", "attention")
        columns = (
            [flat(table, name) for table in tables if name in table.column_names] for name in names
        )
        self.values, self.indices, self.tail, self.draws, self.counts = islice(columns, 5)
        self.hidden, self.attention = columns
        if self.indices and not (self.tail or self.draws):
            raise LabError(
                f"{folder} does not say how likely all but the top {self.k} were, as an older "
                "version made it; delete that folder and run train.py on the config again"
            )
        if self.hidden:
            positions = int((self.rows.lengths - 1).sum())
            self.hidden_width = sum(len(v) for v, _ in self.hidden) // (positions * self.layers)
            every = max(1, positions // HIDDEN_SAMPLE)  # rows come in the order of the alphabet
            shape = (-1, self.layers, self.hidden_width)
            sample = [numbers(v.reshape(shape)[::every].copy()) for v, _ in self.hidden]
            states = torch.cat(sample)
            states = states if states.dtype == torch.float64 else states.float()
            self.hidden_mean, self.hidden_scale = states.mean(0), states.std(0) + TINY
        # whose completion and log-probabilities row i has
        self.source = np.arange(len(self.rows), dtype=np.int32)

    def shuffle(self, seed: int) -> "Outputs":
        """Give every row the outputs of another row (a control): prompts stay, answers move.

        Within prompts of one length, so that states stay at their positions and the control gets
        answers of the right length for the wrong word. A prompt that is alone in its length would
        keep its own answer; it is left out.
        """
        order = np.random.Generator(np.random.PCG64(seed)).permutation(len(self.rows))
        lengths = self.rows.prompt_lengths[order]
        groups = [order[lengths == length] for length in np.unique(lengths)]
        for group in groups:
            self.source[group] = np.roll(group, 1)
        kept = np.sort(np.concatenate([group for group in groups if len(group) > 1]))
        self.source = self.source[kept]
        own, others = self.rows.take(kept), self.rows.take(self.source)
        others.tokens[others.in_prompt()] = own.tokens[own.in_prompt()]  # prompts of equal lengths
        self.rows = Rows(own.ids, others.tokens, others.offsets, others.prompt_lengths)
        return self

    def keep(self, places: np.ndarray) -> "Outputs":
        """Only some of the rows."""
        self.rows, self.source = self.rows.take(places), self.source[places]
        return self

    def signal(self, batch: Batch) -> Signal:
        """What the teacher revealed at the counted positions of a batch of `rows`."""
        if not self.values:
            return Signal(batch.targets)
        log_probs = numbers(self.pieces(self.values, batch))
        if not self.indices:
            return Signal(batch.targets, log_probs.view(len(batch.targets), -1))
        indices = torch.from_numpy(self.pieces(self.indices, batch).astype(np.int64))
        if not self.draws:
            shape, tail = (len(batch.targets), self.k), numbers(self.pieces(self.tail, batch))
            return Signal(batch.targets, log_probs.view(shape), indices.view(shape), tail=tail)
        draws = torch.from_numpy(self.pieces(self.draws, batch).astype(np.int64))
        counts = torch.from_numpy(self.pieces(self.counts, batch).astype(np.float32))
        filled = torch.arange(int(draws.max())) < draws[:, None]
        return Signal(
            batch.targets,
            *(
                torch.zeros(filled.shape, dtype=values.dtype).masked_scatter(filled, values)
                for values in (log_probs, indices, counts / self.k)
            ),
        )

    def inside(self, batch: Batch) -> Inside:
        """States and attention at all positions of a batch of `rows` (access `hidden`)."""
        positions = int(batch.positions.sum())
        states = numbers(self.pieces(self.hidden, batch)).view(positions, self.layers, -1)
        attention = padded(self.slices(self.attention, batch), batch.positions, self.maps)
        return Inside(self.standardise(states), attention)

    def slices(self, shards: list[tuple[np.ndarray, np.ndarray]], batch: Batch) -> list[np.ndarray]:
        """The stored values of each row of a batch, memory-mapped."""
        rows = self.source[batch.indices]
        held_by = np.searchsorted(self.shard_starts, rows, side="right") - 1
        places = rows - self.shard_starts[held_by]
        found = []
        for shard, place in zip(held_by.tolist(), places.tolist(), strict=True):
            values, offsets = shards[shard]
            found.append(values[offsets[place] : offsets[place + 1]])
        return found

    def pieces(self, shards: list[tuple[np.ndarray, np.ndarray]], batch: Batch) -> np.ndarray:
        """The stored values of the rows of a batch, one after the other."""
        return np.concatenate(self.slices(shards, batch))

    def standardise(self, hidden: Tensor) -> Tensor:
        """States [P, layers, W] with mean 0 and variance 1 in every dimension: the large ones of a
        deep layer would otherwise be all that a student looks at."""
        return (hidden.to(self.hidden_mean.dtype) - self.hidden_mean) / self.hidden_scale

    def mean_entropy(self) -> float:
        """Of the teacher's distributions over all positions, in nats (access `logits`)."""
        total = 0.0
        for values, _ in self.values:
            log_probs = numbers(values.copy()).float()
            total -= float((log_probs.exp() * log_probs).double().sum())
        return total / self.positions

    @property
    def positions(self) -> int:
        """Tokens that something was revealed for."""
        return int((self.rows.lengths - self.rows.prompt_lengths).sum())


def padded(pieces: list[np.ndarray], positions: Tensor, layers: int) -> Tensor:
    """Attention of rows of n positions, each [n, layers, n], as one [P, layers, L]. `positions`
    [B, L] says which of a row are its own."""
    counts = positions.sum(1)
    values = numbers(np.concatenate(pieces))
    precision = torch.promote_types(values.dtype, torch.float32)
    own = torch.arange(positions.shape[1]) < counts.repeat_interleave(counts)[:, None, None]
    whole = torch.zeros((len(own), layers, positions.shape[1]), dtype=precision)
    return whole.masked_scatter(own, values.to(precision))


def flat(table: pa.Table, column: str) -> tuple[np.ndarray, np.ndarray]:
    """A list column as its values, memory-mapped, and its offsets."""
    chunk = table[column].chunk(0)
    return chunk.values.to_numpy(zero_copy_only=True), chunk.offsets.to_numpy()


def sha256_of_file(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
