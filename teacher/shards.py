"""The files of the outputs: writing one shard, and reading all shards as one.

A shard is an Arrow stream. One record is one row: its id, its tokens, how many of them are the
prompt, and the columns that the access level stores at the positions of the completion (see
teacher/access.py), for instance

log_probs   nats at temperature 1
indices     the tokens of these log-probabilities, where not all are stored
hidden      the states after some layers, at all positions of the row except the last
attention   the attention maps at these positions; then, if requested, the value relations

Floats are float16, token ids and counts the smallest integer type that fits. Reading is
memory-mapped: a student reads only its batch.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from configs.files import Shape, read_sealed, say, sha256_of_file, write_sealed
from configs.schema import LabError
from models.rows import Batch, Chunks, Rows
from teacher.access import ACCESS
from teacher.signal import HiddenSignal, Signal

MIN_DEVIATION = 1e-8  # of a dimension of the states
STATES_SAMPLE = 50_000  # positions that mean and deviation of the states are computed from
AGAIN = "run train.py on the config again"


@dataclass(frozen=True)
class Record:
    """One row and the columns of what the teacher revealed there, flattened and in the types in
    which they are written."""

    id: int
    tokens: np.ndarray
    prompt_length: int
    columns: dict[str, np.ndarray]


def shard_name(number: int, sha256: str, binding: dict[str, Any]) -> str:
    """A shard's name contains a hash of its number, content and binding: a damaged shard, or one of
    another number or run, is never mistaken for it."""
    bound = json.dumps([number, sha256, binding], sort_keys=True)
    return f"shard-{number:05d}.{hashlib.sha256(bound.encode()).hexdigest()[:16]}.arrow"


def find_shard(folder: Path, number: int, binding: dict[str, Any]) -> Path | None:
    """The shard with this number, if it is intact; a damaged one is set aside."""
    for file in sorted(folder.glob(f"shard-{number:05d}.*")):
        if not file.is_symlink() and file.name == shard_name(number, sha256_of_file(file), binding):
            return file
        say(f"{file} is damaged or belongs to other outputs; set aside, and made again")
        os.replace(file, file.with_name(f"damaged-{file.name}"))
    return None


def write_shard(
    folder: Path,
    number: int,
    binding: dict[str, Any],
    records: Iterator[Record],
    asked: int,
    flops: Callable[[], float],
) -> None:
    """Write one shard, with the FLOPs that its source has spent on it and, if there are fewer
    records than rows were asked, their number."""
    before = flops()
    ids, prompts, lists, tokens = [], [], {"tokens": []}, 0
    for record in records:
        tokens += len(record.tokens) - record.prompt_length
        ids.append(record.id)
        prompts.append(record.prompt_length)
        lists["tokens"].append(record.tokens)
        for name, values in record.columns.items():
            lists.setdefault(name, []).append(values)
    columns = {"id": pa.array(ids, pa.int64()), "prompt_length": pa.array(prompts, pa.int32())}
    columns |= {name: ragged(arrays) for name, arrays in lists.items()}
    cost = {"flops": repr(flops() - before), "tokens": str(tokens)}
    cost |= {"asked": str(asked)} if len(ids) < asked else {}
    table = pa.table(columns).combine_chunks().replace_schema_metadata(cost)
    partial = folder / f".shard-{number:05d}.partial"
    with open(partial, "wb") as sink:
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        sink.flush()
        os.fsync(sink.fileno())  # otherwise a power cut might leave an empty file
    os.replace(partial, folder / shard_name(number, sha256_of_file(partial), binding))


def ragged(arrays: list[np.ndarray]) -> pa.LargeListArray:
    offsets = np.concatenate([[0], np.cumsum([len(array) for array in arrays])])
    return pa.LargeListArray.from_arrays(offsets, pa.array(np.concatenate(arrays)))


def read_shard(file: Path, columns: Sequence[str]) -> pa.Table:
    """A shard with these list columns, memory-mapped. LabError if the file is not a valid shard,
    whatever its hash."""
    try:
        table = pa.ipc.open_stream(pa.memory_map(str(file))).read_all()
        table.validate()
        table.select(["id", "prompt_length"])
        if not all(pa.types.is_large_list(table.schema.field(name).type) for name in columns):
            raise ValueError("a list column has another type")
        if any(column.num_chunks != 1 or column.null_count for column in table.columns):
            raise ValueError("a column is chunked or has nulls")
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise LabError(
            f"{file} is not a shard of outputs ({' '.join(str(error).split())[:100]}); move "
            f"{file.parent} elsewhere and {AGAIN}"
        ) from None
    return table


def check_binding(folder: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """LabError with the first key that differs, if these are not the outputs that are needed."""
    for key in dict.fromkeys([*expected, *found]):
        value = expected.get(key, "nothing")
        if found.get(key, "nothing") != value:
            raise LabError(
                f"{folder} was made with another {key} ({str(found.get(key))[:16]}, expected "
                f"{str(value)[:16]}); move that folder elsewhere and {AGAIN}"
            )


class Outputs:
    """A folder of outputs, open for reading: `rows`, and the `signal` at the rows of a batch."""

    def __init__(self, folder: Path, binding: dict[str, Any] | None = None) -> None:
        """LabError if a shard is missing or damaged, or if the outputs have another binding than
        `binding`."""
        provenance = read_provenance(folder)
        bound_to = provenance["binding"]
        if binding is not None:
            check_binding(folder, bound_to, binding)
        if not provenance["shards"]:
            raise LabError(f"{folder} is not finished; run train.py on the config to resume")
        self.access, self.k = ACCESS[bound_to["access"]], bound_to.get("k")
        self.layers = len(bound_to.get("layers", []))
        names = [*self.access.columns, *(("hidden", "attention") if self.layers else ())]
        tables = [
            verified_shard(folder, name, digest, ["tokens", *names])
            for name, digest in provenance["shards"].items()
        ]
        self.maps = self.layers * (2 if bound_to.get("relations") else 1)
        tokens = [flat(table, "tokens") for table in tables]
        self.rows = Rows.build_flat(
            ids=Chunks([table["id"].chunk(0).to_numpy() for table in tables]),
            tokens=Chunks([values for values, _ in tokens]),
            lengths=np.concatenate([np.diff(offsets) for _, offsets in tokens]),
            prompt_lengths=np.concatenate([table["prompt_length"].to_numpy() for table in tables]),
        )
        self.shard_starts = np.cumsum([0, *(len(table) for table in tables)])
        self.columns = {name: [flat(table, name) for table in tables] for name in names}
        if self.layers:
            self.measure_states()
        # the stored row whose completion and signal row i has
        self.source = np.arange(len(self.rows), dtype=np.int32)

    def measure_states(self) -> None:
        """The mean and deviation of every dimension of the states, from a sample of positions."""
        positions, stored = int((self.rows.lengths - 1).sum()), self.columns["hidden"]
        self.width = sum(len(values) for values, _ in stored) // (positions * self.layers)
        every = max(1, positions // STATES_SAMPLE)  # rows come in alphabetical order
        shape = (-1, self.layers, self.width)
        sample = [torch.from_numpy(v.reshape(shape)[::every].copy()) for v, _ in stored]
        states = torch.cat(sample)
        states = states if states.dtype == torch.float64 else states.float()
        self.states_mean, self.states_scale = states.mean(0), states.std(0) + MIN_DEVIATION

    def shuffled(self, seed: int) -> "Outputs":
        """The same outputs, but every row gets those of another row (a control): prompts stay,
        answers move.

        Rows are exchanged among prompts of equal length, so that states stay at their positions and
        answers have a plausible length. A row whose prompt is the only one of its length is
        dropped: it would keep its answer.
        """
        order = np.random.Generator(np.random.PCG64(seed)).permutation(len(self.rows))
        lengths = self.rows.prompt_lengths[order]
        groups = [order[lengths == length] for length in np.unique(lengths)]
        source = self.source.copy()
        for group in groups:
            source[group] = np.roll(group, 1)
        kept = np.sort(np.concatenate([group for group in groups if len(group) > 1]))
        source = source[kept]
        asked, answered = self.rows.take(kept), self.rows.take(source)
        answered.tokens[answered.in_prompt()] = asked.tokens[asked.in_prompt()]  # equal lengths
        rows = Rows(asked.ids, answered.tokens, answered.offsets, answered.prompt_lengths)
        return self.with_rows(rows, source)

    def keep(self, indices: np.ndarray) -> "Outputs":
        """The same with only some of the rows."""
        return self.with_rows(self.rows.take(indices), self.source[indices])

    def with_rows(self, rows: Rows, source: np.ndarray) -> "Outputs":
        other = copy(self)
        other.rows, other.source = rows, source
        return other

    def signal(self, batch: Batch) -> Signal:
        """What the teacher revealed at the counted positions of a batch of `rows`."""
        self.check_rows(batch)
        columns = {name: self.values(name, batch) for name in self.access.columns}
        return self.access.read(columns, batch.targets, self.k)

    def hidden(self, batch: Batch) -> HiddenSignal:
        """States and attention at all positions of a batch of `rows` (with request.layers)."""
        self.check_rows(batch)
        positions = int(batch.positions.sum())
        states = torch.from_numpy(self.values("hidden", batch)).view(positions, self.layers, -1)
        maps = padded(self.pieces("attention", batch), batch.positions, self.maps)
        return HiddenSignal.of_maps(self.standardise(states), maps)

    def check_rows(self, batch: Batch) -> None:
        """ValueError for a batch of other rows: it would silently get the outputs of these."""
        if not np.array_equal(self.rows.ids[batch.indices], batch.ids):
            raise ValueError("this batch was not built from the rows of these outputs")

    def pieces(self, column: str, batch: Batch) -> list[np.ndarray]:
        """The stored values of each row of a batch, memory-mapped."""
        shards, rows = self.columns[column], self.source[batch.indices]
        held_by = np.searchsorted(self.shard_starts, rows, side="right") - 1
        places = rows - self.shard_starts[held_by]
        found = []
        for shard, place in zip(held_by.tolist(), places.tolist(), strict=True):
            values, offsets = shards[shard]
            found.append(values[offsets[place] : offsets[place + 1]])
        return found

    def values(self, column: str, batch: Batch) -> np.ndarray:
        """The stored values of the rows of a batch, one after the other."""
        return np.concatenate(self.pieces(column, batch))

    def standardise(self, states: Tensor) -> Tensor:
        """States [P, layers, W] with mean 0 and variance 1 in every dimension: the large ones of a
        deep layer would otherwise dominate the loss."""
        return (states.to(self.states_mean.dtype) - self.states_mean) / self.states_scale

    def mean_entropy(self) -> float:
        """The mean entropy of the teacher's distributions, in nats; needs full distributions."""
        total = 0.0
        for values, _ in self.columns["log_probs"]:
            log_probs = torch.from_numpy(values.copy()).float()
            total -= float((log_probs.exp() * log_probs).double().sum())
        return total / int((self.rows.lengths - self.rows.prompt_lengths).sum())


class Provenance(Shape):
    """provenance.json: what the outputs are bound to; {shard: sha256} when they are finished."""

    binding: dict[str, Any]
    shards: dict[str, str] | None


def read_provenance(folder: Path) -> dict[str, Any]:
    """The content of provenance.json. LabError if it was changed."""
    return read_sealed(
        folder / "provenance.json", Provenance, f"move {folder} elsewhere and {AGAIN}"
    )


def write_provenance(
    folder: Path, binding: dict[str, Any], shards: dict[str, str] | None = None
) -> None:
    write_sealed(folder / "provenance.json", {"binding": binding, "shards": shards})


def verified_shard(folder: Path, name: str, digest: str, columns: Sequence[str]) -> pa.Table:
    """A shard whose content has the recorded hash. LabError if it does not."""
    file = folder / name
    if file.is_symlink() or file.parent != folder or Path(name).name != name:
        raise LabError(f"{folder}: {name!r} is not a file of this folder; delete it")
    if not file.exists() or sha256_of_file(file) != digest:
        raise LabError(
            f"{file} is {'damaged' if file.exists() else 'missing'}; move {folder} elsewhere and "
            f"{AGAIN}"
        )
    return read_shard(file, columns)


def padded(pieces: list[np.ndarray], positions: Tensor, maps: int) -> Tensor:
    """Maps of rows of n positions, each [n, maps, n], as one [P, maps, L]. `positions` [B, L] marks
    the n positions of each row."""
    counts = positions.sum(1)
    values = torch.from_numpy(np.concatenate(pieces))
    precision = torch.promote_types(values.dtype, torch.float32)
    filled = torch.arange(positions.shape[1]) < counts.repeat_interleave(counts)[:, None, None]
    full = torch.zeros((len(filled), maps, positions.shape[1]), dtype=precision)
    return full.masked_scatter(filled, values.to(precision))


def flat(table: pa.Table, column: str) -> tuple[np.ndarray, np.ndarray]:
    """A list column as its values, memory-mapped, and its offsets."""
    chunk = table[column].chunk(0)
    return chunk.values.to_numpy(zero_copy_only=True), chunk.offsets.to_numpy()
