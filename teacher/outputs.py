"""The teacher's outputs: computed once, stored by row id, bound to what they were made from.

A folder of shards (see teacher/shards.py) and a provenance.json that records the binding.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configs.files import sha256_of_file
from configs.schema import LabError, Recipe
from models.rows import Rows
from tasks.task import Task
from teacher.access import ACCESS, narrow, packed
from teacher.shards import (
    AGAIN,
    Record,
    check_binding,
    find_shard,
    read_provenance,
    read_shard,
    write_provenance,
    write_shard,
)
from teacher.source import Source, TeacherRow, bytes_of

Mark = tuple[float | None, float | None]  # bias of a watermark, share of the prompts; see Account
UNMARKED: Mark = (None, None)
DEFENCES = ("watermark", "watermark_share", "antidistillation", "proxy")
SHARD_ROWS = 8192
SHARD_TOKENS = 2**19  # at most: an interruption loses no more work than this
SHARD_BYTES = 2**30  # of full distributions, at most: a shard is in memory until it is written


@dataclass(frozen=True)
class OutputsRequest:
    """Which outputs are needed. Equal requests share a folder; its name and the binding of its
    content follow from the fields below."""

    teachers: tuple[str, ...]
    sequences: str
    access: str
    k: int | None
    layers: tuple[int, ...]
    relations: bool
    prompts: str | None
    temperature: float | None
    transfer_rows: int | None
    watermark: float | None = None
    watermark_share: float | None = None
    antidistillation: float | None = None
    proxy: str | None = None

    @classmethod
    def of(cls, recipe: Recipe, relations: bool = False) -> "OutputsRequest":
        """What a recipe needs; irrelevant fields are None."""
        outputs, writes = recipe.outputs, recipe.sequences == "teacher"
        return cls(
            teachers=tuple(recipe.teachers),
            sequences=recipe.sequences,
            access=recipe.access,
            k=outputs.k if ACCESS[recipe.access].uses_k else None,
            layers=tuple(outputs.layers),
            relations=relations,
            prompts=outputs.prompts if writes else None,
            temperature=outputs.temperature if writes else None,
            transfer_rows=outputs.transfer_rows,
            watermark=outputs.watermark if writes else None,
            watermark_share=outputs.watermark_share if writes else None,
            antidistillation=outputs.antidistillation if writes else None,
            proxy=outputs.proxy if writes else None,
        )

    @property
    def name(self) -> str:
        """`teacher-top_k-8-train-5000`: the fields that are set."""
        parts: list[str] = []
        for field in fields(self):
            value = getattr(self, field.name)
            if value == ("teacher",) or not value:
                continue
            if isinstance(value, tuple):
                parts += map(str, value)
            elif isinstance(value, float):
                parts.append(f"{field.name}-{value:g}")
            else:
                parts.append(field.name if value is True else str(value))
        return "-".join(parts)

    @property
    def mark(self) -> Mark:
        return self.watermark, self.watermark_share

    @property
    def stage(self) -> str:
        return f"outputs/{self.name}"

    def binding(
        self, teacher_sha256: str, tokenizer_sha256: str, rows: Rows, seed: int
    ) -> dict[str, Any]:
        """Everything that the outputs depend on: if any of it differs, so do they."""
        wanted = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        for name in DEFENCES:  # absent, as before there were any
            if wanted[name] is None:
                del wanted[name]
        return {
            "teacher": teacher_sha256,
            "tokenizer": tokenizer_sha256,
            "rows": rows.digest(),
            **wanted,
            "seed": seed,
        }

    def rows_from_data(self, rows: Rows) -> int:
        """How many of the answered prompts come from the data; the teacher invents the rest."""
        if self.prompts == "invented":
            return 0
        count = self.transfer_rows or len(rows)
        return min(count, len(rows)) if self.prompts == "extended" else count

    def indices(self, rows: Rows, start: int = 0, size: int | None = None) -> np.ndarray:
        """The rows of the data to answer: evenly spaced, as rows may be in alphabetical order."""
        count = self.rows_from_data(rows)
        size = count if size is None else size
        return np.arange(start, start + size) * len(rows) // count

    def rows_of_shard(self, longest_answer: int, vocabulary: int) -> int:
        """How many rows a shard has, given the tokens of the longest answer."""
        at_most = min(SHARD_ROWS, SHARD_TOKENS // longest_answer)
        if "distribution" in ACCESS[self.access].reveals:
            at_most = min(at_most, SHARD_BYTES // (2 * longest_answer * vocabulary))
        return max(1, at_most)


def make_outputs(
    folder: Path,
    source: Source,
    rows: Rows,
    request: OutputsRequest,
    binding: dict[str, Any],
    progress: Callable[[int], None] = lambda rows: None,
    process: int = 0,
    processes: int = 1,
) -> None:
    """Write the teacher's outputs for `rows`, shard by shard; intact shards are kept.

    A killed run resumes at the first missing shard: the content of a shard depends only on the
    rows, the seed and the shard's number. Several processes share the shards.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "provenance.json").exists():
        check_binding(folder, read_provenance(folder)["binding"], binding)
    else:
        write_provenance(folder, binding)
    count, known = request.transfer_rows or len(rows), request.rows_from_data(rows)
    taken: set[bytes] = set()
    if 0 < known < count:
        taken = {bytes_of(rows.prompt(i)) for i in range(len(rows))}
    shard_rows = request.rows_of_shard(source.task.longest_answer, source.task.vocabulary)
    for number, start in enumerate(range(0, count, shard_rows)):
        size = min(shard_rows, count - start)
        if number % processes == process and not find_shard(folder, number, binding):
            generator = torch.Generator().manual_seed(binding["seed"] * 1_000_003 + number)
            from_data = min(size, max(0, known - start))
            asked = rows.take(request.indices(rows, start, from_data)) if from_data else None
            records = shard_records(
                source, request, asked, size - from_data, taken, generator, progress
            )
            write_shard(folder, number, binding, records, size, lambda: source.flops)


def shard_records(
    source: Source,
    request: OutputsRequest,
    asked: Rows | None,
    invented: int,
    taken: set[bytes],
    generator: torch.Generator,
    progress: Callable[[int], None],
) -> Iterator[Record]:
    """The records of one shard: the rows asked, in their order, without those whose answers cannot
    be read; then invented ones."""
    probabilities = ACCESS[request.access].probabilities
    temperature = request.temperature or 0.0
    if asked is not None:
        if request.sequences == "teacher":
            answers = source.answer(asked, temperature, probabilities, generator)
        else:
            answers = source.score(asked)
        records: list[Record | None] = [None] * len(asked)
        for row in answers:
            records[row.index] = record_of(row, request, source.task, generator)
            progress(1)
        yield from (record for record in records if record is not None)
    if invented:
        for row in source.invent(invented, temperature, probabilities, generator, taken):
            progress(1)
            yield record_of(row, request, source.task, generator)


def record_of(
    row: TeacherRow, request: OutputsRequest, task: Task, generator: torch.Generator
) -> Record:
    """What is stored of a row: only what the access level reveals."""
    access, columns = ACCESS[request.access], {}
    if access.probabilities:
        targets = torch.from_numpy(row.tokens[row.prompt_length :].astype(np.int64))
        signal = access.reveal(row.log_probs, targets, request.k, generator).to("cpu")
        columns |= access.store(signal, request.k, task.vocabulary)
    if request.layers:
        columns |= {"hidden": packed(row.states.cpu()), "attention": packed(row.maps.cpu())}
    tokens = narrow(row.tokens, task.input_vocabulary)
    return Record(row.id, tokens, row.prompt_length, columns)


@dataclass(frozen=True)
class OutputsSummary:
    """Totals over all shards: FLOPs, size in bytes, completion tokens, rows with different
    prompts."""

    flops: float
    bytes: int
    tokens: int
    different: int


def finish_outputs(folder: Path, rows: int) -> OutputsSummary:
    """Record the hashes of all shards, which makes the outputs readable. LabError if shards are
    missing, or if they hold more than this number of rows."""
    binding = read_provenance(folder)["binding"]
    shards, flops, size, tokens, ids = {}, 0.0, 0, 0, [np.empty(0, np.int64)]
    asked = 0
    while asked < rows:
        file = find_shard(folder, len(shards), binding)
        if file is None:
            raise LabError(f"{folder}: shard {len(shards)} is missing; {AGAIN}")
        table = read_shard(file, ["tokens"])
        shards[file.name], size = sha256_of_file(file), size + file.stat().st_size
        asked += int(table.schema.metadata.get(b"asked", len(table)))
        flops += float(table.schema.metadata[b"flops"])
        tokens += int(table.schema.metadata[b"tokens"])
        ids.append(table["id"].to_numpy().copy())  # a view would keep the shard mapped
    extra = {file.name for file in folder.glob("shard-*")} - shards.keys()
    if extra or sum(map(len, ids)) > rows:
        raise LabError(
            f"{folder} holds more than the {rows} rows of these outputs "
            f"({min(extra, default=file.name)}); move that folder elsewhere and {AGAIN}"
        )
    write_provenance(folder, binding, shards)
    return OutputsSummary(flops, size, tokens, len(np.unique(np.concatenate(ids))))


def sha256_of_outputs(folder: Path) -> str:
    """One hash over the shards of a finished folder."""
    shards = read_provenance(folder)["shards"] or {}
    return hashlib.sha256("".join(shards.values()).encode()).hexdigest()
