"""The teacher's outputs: made once, stored by row id, bound to what made them, read by students.

A folder of Arrow shards and a provenance.json. One record is one row: its id, its tokens, how
many of them are the prompt, the log-probabilities at the positions of the completion (float16,
nats, temperature 1), and for access `hidden` the states and the attention at all positions but
the last (float16).
Reading is memory-mapped: a student touches only its batch.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from configs.runs import read_json, write_json
from configs.schema import LabError, Recipe
from tasks.rows import Batch, Rows, collate, row_id
from teacher.model import Forward, generate
from teacher.signal import TINY, Inside, Signal, shows_states, states_of

SHARD_ROWS = 8192
BATCH_ROWS = 512
HIDDEN_SAMPLE = 50_000  # positions that tell the mean and deviation of the states
RAREST_WORDS = 0.02  # a teacher that invents fewer well-formed words than this is given up


def name_of(recipe: Recipe) -> str:
    """The folder of the outputs that a recipe needs: recipes that need the same share it."""
    access = f"top_{recipe.k}" if recipe.access == "top_k" else recipe.access
    parts = [recipe.sequences, access, *map(str, recipe.hidden_layers)]
    if recipe.sequences == "teacher":
        parts += [recipe.prompts]
        if recipe.sampling_temperature:
            parts.append(f"sampled-{recipe.sampling_temperature:g}")
    if recipe.transfer_rows:
        parts.append(str(recipe.transfer_rows))
    return "-".join(parts)


def outputs_binding(
    recipe: Recipe, teacher_sha256: str, tokenizer_sha256: str, rows: Rows, seed: int
) -> dict[str, Any]:
    """What outputs are bound to: if any of this differs they are another teacher's outputs."""
    return {
        "teacher": teacher_sha256,
        "tokenizer": tokenizer_sha256,
        "rows": rows.digest(),
        "access": recipe.access,
        "k": recipe.k if recipe.access == "top_k" else None,
        "hidden_layers": list(recipe.hidden_layers),
        "sequences": recipe.sequences,
        "prompts": recipe.prompts,
        "transfer_rows": recipe.transfer_rows,
        "sampling_temperature": recipe.sampling_temperature,
        "seed": seed,
    }


def make_outputs(
    folder: Path,
    forward: Forward,
    task: Any,
    rows: Rows,
    recipe: Recipe,
    binding: dict[str, Any],
    progress: Callable[[int], None] = lambda rows: None,
) -> float:
    """Write the teacher's outputs for `rows`, shard by shard; shards already there are kept.

    A killed run goes on at the first missing shard: what a shard holds depends on the rows, the
    seed and the shard's number alone. Returns the FLOPs of all shards, those of an earlier,
    interrupted part too: each shard says what it cost.
    """
    folder.mkdir(parents=True, exist_ok=True)
    provenance = folder / "provenance.json"
    if provenance.exists():
        check_binding(folder, read_json(provenance)["binding"], binding)
    else:
        write_json(provenance, {"binding": binding, "shards": None})
    count = recipe.transfer_rows or len(rows)
    starts = range(0, count, SHARD_ROWS)
    for number, start in enumerate(starts):
        file = folder / f"shard-{number:05d}.arrow"
        size = min(SHARD_ROWS, count - start)
        if not file.exists():
            generator = torch.Generator().manual_seed(binding["seed"] * 1_000_003 + number)
            if recipe.prompts == "invented":
                records = invented(forward, task, size, recipe, generator, progress)
            else:
                # Transfer rows are drawn evenly: rows come in dictionary order.
                picked = np.arange(start, start + size) * len(rows) // count
                answer = written if recipe.sequences == "teacher" else scored
                records = answer(forward, task, rows.take(picked), recipe, generator, progress)
            write_shard(file, records, recipe, forward)
    shards, flops = {}, 0.0
    for number in range(len(starts)):
        file = folder / f"shard-{number:05d}.arrow"
        shards[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
        with pa.memory_map(str(file)) as source:
            flops += float(pa.ipc.open_stream(source).schema.metadata[b"flops"])
    write_json(provenance, {"binding": binding, "shards": shards})
    return flops


def sha256_of_outputs(folder: Path) -> str:
    """One hash over the shards of a finished folder."""
    shards = read_json(folder / "provenance.json")["shards"]
    return hashlib.sha256("".join(shards.values()).encode()).hexdigest()


@dataclass(frozen=True)
class Record:
    """One row and what the teacher revealed there: log_probs [completion, V], hidden
    [row - 1, layers, W], attention [row - 1, layers, row - 1], or none of them."""

    id: int
    tokens: np.ndarray
    prompt_length: int
    log_probs: torch.Tensor | None
    hidden: torch.Tensor | None = None
    attention: torch.Tensor | None = None


def scored(
    forward: Forward, task: Any, rows: Rows, recipe: Recipe, _: Any, progress: Callable
) -> Iterator[Record]:
    """Sequences `data`: the teacher reads the data's own completions and says what it expected."""
    order = np.argsort(rows.lengths, kind="stable")
    records: list[Record | None] = [None] * len(rows)
    layers = recipe.hidden_layers
    for indices in np.array_split(order, -(-len(rows) // BATCH_ROWS)):
        batch = collate(rows, indices, task.tokenizer.pad_token_id)
        with torch.no_grad():
            output = forward(batch.input_ids, **shows_states(layers))
        log_probs = torch.log_softmax(output.logits[batch.counted], -1)
        log_probs = log_probs.split(batch.counted.sum(1).tolist())
        hidden, attention = states_of(output, layers) if layers else (None, None)
        for place, i in enumerate(indices):
            n = rows.lengths[i] - 1
            records[i] = Record(
                int(rows.ids[i]),
                rows.row(i),
                int(rows.prompt_lengths[i]),
                log_probs[place],
                hidden[place, :n] if layers else None,
                attention[place, :n, ..., :n] if layers else None,
            )
        progress(len(indices))
    yield from records


def written(
    forward: Forward,
    task: Any,
    rows: Rows,
    recipe: Recipe,
    generator: torch.Generator,
    progress: Callable,
) -> Iterator[Record]:
    """Sequences `teacher`: it answers the rows' prompts, in batches of one prompt length."""
    records: list[Record | None] = [None] * len(rows)
    for length in np.unique(rows.prompt_lengths):
        group = np.flatnonzero(rows.prompt_lengths == length)
        for indices in np.array_split(group, -(-len(group) // BATCH_ROWS)):
            prompts = torch.from_numpy(np.stack([rows.prompt(i) for i in indices]).astype(np.int64))
            answers = generate(
                forward,
                prompts,
                longest=task.longest_answer,
                end=task.tokenizer.eos_token_id,
                temperature=recipe.sampling_temperature,
                generator=generator,
                keep_log_probs=recipe.access != "text",
                keep_layers=recipe.hidden_layers,
            )
            for i, answer in zip(indices, answers, strict=True):
                row = np.concatenate([rows.prompt(i), answer.tokens.numpy()])
                records[i] = Record(
                    int(rows.ids[i]),
                    row,
                    int(length),
                    answer.log_probs,
                    answer.hidden,
                    answer.attention,
                )
            progress(len(indices))
    yield from records


def invented(
    forward: Forward,
    task: Any,
    count: int,
    recipe: Recipe,
    generator: torch.Generator,
    progress: Callable,
) -> Iterator[Record]:
    """Prompts `invented`: the teacher writes whole rows, words of its own and their answers.

    A word that is not well formed, or that belongs to a split which must stay unseen, is dropped.
    """
    made, tried = 0, 0
    while made < count:
        if made < tried * RAREST_WORDS:
            raise LabError(
                f"the teacher invents hardly any well-formed words ({made} of {tried} tries); "
                "train it longer or with a larger teacher.training.prompt_weight"
            )
        tried += BATCH_ROWS
        start = torch.full((BATCH_ROWS, 1), task.tokenizer.bos_token_id)
        rows = generate(
            forward,
            start,
            longest=task.longest_row - 1,
            end=task.tokenizer.eos_token_id,
            temperature=recipe.sampling_temperature,
            generator=generator,
            separator=task.separator,
            keep_log_probs=recipe.access != "text",
            keep_layers=recipe.hidden_layers,
        )
        for written_row in rows:
            row = np.concatenate([[task.tokenizer.bos_token_id], written_row.tokens.numpy()])
            prompt_length = task.invented_prompt_length(row)
            if prompt_length is None or made == count:
                continue
            made += 1
            progress(1)
            log_probs = written_row.log_probs
            yield Record(
                row_id(f"{task.name} {row.tolist()}"),
                row,
                prompt_length,
                None if log_probs is None else log_probs[prompt_length - 1 :],
                written_row.hidden,
                written_row.attention,
            )


def write_shard(file: Path, records: Iterator[Record], recipe: Recipe, forward: Forward) -> None:
    """One shard as an Arrow stream: no more than the access of the recipe reveals, and what it
    cost a counted teacher."""
    before = getattr(forward, "flops", 0.0)
    ids, tokens, prompts, values, indices, hidden, attention = [], [], [], [], [], [], []
    for record in records:
        ids.append(record.id)
        tokens.append(np.asarray(record.tokens, np.int32))
        prompts.append(record.prompt_length)
        if recipe.access == "top_k":
            top = record.log_probs.topk(recipe.k, dim=-1)
            values.append(stored(top.values))
            indices.append(top.indices.int().numpy().ravel())
        elif recipe.access != "text":
            values.append(stored(record.log_probs))
        if recipe.access == "hidden":
            hidden.append(stored(record.hidden))
            attention.append(stored(record.attention))
    columns = {
        "id": pa.array(ids, pa.int64()),
        "tokens": ragged(tokens),
        "prompt_length": pa.array(prompts, pa.int32()),
    }
    if values:
        columns["log_probs"] = ragged(values)
    if indices:
        columns["indices"] = ragged(indices)
    if hidden:
        columns["hidden"] = ragged(hidden)
        columns["attention"] = ragged(attention)
    cost = {"flops": repr(getattr(forward, "flops", 0.0) - before)}
    table = pa.table(columns).combine_chunks().replace_schema_metadata(cost)
    partial = file.with_name(f".{file.name}.partial")
    with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    os.replace(partial, file)


def stored(values: torch.Tensor) -> np.ndarray:
    """Flat float16; float64 stays what it is, for traces that must agree on every machine."""
    return (values if values.dtype == torch.float64 else values.half()).numpy().ravel()


def ragged(arrays: list[np.ndarray]) -> pa.LargeListArray:
    offsets = np.concatenate([[0], np.cumsum([len(array) for array in arrays])])
    return pa.LargeListArray.from_arrays(offsets, pa.array(np.concatenate(arrays)))


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
            if not file.exists() or hashlib.sha256(file.read_bytes()).hexdigest() != digest:
                raise LabError(
                    f"{file} is {'damaged' if file.exists() else 'missing'}; delete {folder} and "
                    "run train.py on the config again"
                )
            tables.append(pa.ipc.open_stream(pa.memory_map(str(file))).read_all())
        if not tables:
            raise LabError(f"{folder} is not finished; run train.py on the config to go on")
        self.k = provenance["binding"].get("k")
        self.layers = len(provenance["binding"].get("hidden_layers", []))
        self.rows = Rows.build_flat(
            ids=joined(tables, "id"),
            tokens=np.concatenate([flat(table, "tokens")[0] for table in tables]),
            lengths=np.concatenate([np.diff(flat(table, "tokens")[1]) for table in tables]),
            prompt_lengths=joined(tables, "prompt_length"),
        )
        self.shard_starts = np.cumsum([0, *(len(table) for table in tables)])
        self.values, self.indices, self.hidden, self.attention = (
            [flat(table, column) for table in tables if column in table.column_names]
            for column in ("log_probs", "indices", "hidden", "attention")
        )
        if self.hidden:
            positions = int((self.rows.lengths - 1).sum())
            self.hidden_width = sum(len(v) for v, _ in self.hidden) // (positions * self.layers)
            every = max(1, positions // HIDDEN_SAMPLE)  # rows come in the order of the alphabet
            shape = (-1, self.layers, self.hidden_width)
            sample = np.concatenate([v.reshape(shape)[::every] for v, _ in self.hidden])
            states = torch.from_numpy(sample.astype(np.promote_types(sample.dtype, np.float32)))
            self.hidden_mean, self.hidden_scale = states.mean(0), states.std(0) + TINY
        self.source = np.arange(len(self.rows))  # whose completion and log-probabilities row i has

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
        rows, self.source = self.rows, self.source[kept]
        self.rows = Rows.build(
            rows.ids[kept].tolist(),
            [rows.prompt(i).tolist() for i in kept],
            [rows.completion(i).tolist() for i in self.source],
        )
        return self

    def signal(self, batch: Batch) -> Signal:
        """What the teacher revealed at the counted positions of a batch of `rows`."""
        if not self.values:
            return Signal(batch.targets)
        counted = len(batch.targets)
        log_probs = joined_rows(self.pieces(self.values, batch)).view(counted, -1)
        if not self.indices:
            return Signal(batch.targets, log_probs)
        indices = joined_rows(self.pieces(self.indices, batch)).long().view(counted, self.k)
        return Signal(batch.targets, log_probs, indices)

    def inside(self, batch: Batch) -> Inside:
        """States and attention at all positions of a batch of `rows` (access `hidden`)."""
        positions = int(batch.positions.sum())
        states = joined_rows(self.pieces(self.hidden, batch)).view(positions, self.layers, -1)
        attention = padded(self.pieces(self.attention, batch), batch.positions, self.layers)
        return Inside(self.standardise(states), attention)

    def pieces(self, shards: list[tuple[np.ndarray, np.ndarray]], batch: Batch) -> list[np.ndarray]:
        """The stored values of the rows of a batch, memory-mapped."""
        found = []
        for row in self.source[batch.indices]:
            shard = np.searchsorted(self.shard_starts, row, side="right") - 1
            values, offsets = shards[shard]
            place = row - self.shard_starts[shard]
            found.append(values[offsets[place] : offsets[place + 1]])
        return found

    def standardise(self, hidden: torch.Tensor) -> torch.Tensor:
        """States [P, layers, W] with mean 0 and variance 1 in every dimension: the large ones of a
        deep layer would otherwise be all that a student looks at."""
        return (hidden.to(self.hidden_mean.dtype) - self.hidden_mean) / self.hidden_scale

    def mean_entropy(self) -> float:
        """Of the teacher's distributions over all positions, in nats (access `logits`)."""
        total, positions = 0.0, 0
        for values, _ in self.values:
            log_probs = values.reshape(-1, self.k or self.width).astype(np.float32)
            total -= float((np.exp(log_probs) * log_probs).sum())
            positions += len(log_probs)
        return total / positions

    @property
    def width(self) -> int:
        """Outcomes per position."""
        completions = self.rows.lengths - self.rows.prompt_lengths
        return sum(len(values) for values, _ in self.values) // int(completions.sum())


def joined_rows(pieces: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(pieces))


def padded(pieces: list[np.ndarray], positions: torch.Tensor, layers: int) -> torch.Tensor:
    """Attention of rows of n positions, each [n, layers, n], as one [P, layers, L]. `positions`
    [B, L] says which of a row are its own."""
    counts = positions.sum(1).tolist()
    precision = np.promote_types(pieces[0].dtype, np.float32)
    whole = np.zeros((sum(counts), layers, positions.shape[1]), precision)
    start = 0
    for piece, n in zip(pieces, counts, strict=True):
        whole[start : start + n, :, :n] = piece.reshape(n, layers, n)
        start += n
    return torch.from_numpy(whole)


def joined(tables: list[pa.Table], column: str) -> np.ndarray:
    return np.concatenate([table[column].to_numpy() for table in tables])


def flat(table: pa.Table, column: str) -> tuple[np.ndarray, np.ndarray]:
    """A list column as its values, memory-mapped, and its offsets."""
    chunk = table[column].chunk(0)
    return chunk.values.to_numpy(zero_copy_only=True), chunk.offsets.to_numpy()
