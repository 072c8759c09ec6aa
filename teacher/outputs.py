"""The teacher's outputs: made once, stored by row id, bound to what made them, read by students.

A folder of shards, as teacher/shards.py describes them, and a provenance.json that says what they
are bound to.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from configs.runs import read_json, write_json
from configs.schema import Config, LabError, Recipe
from tasks.rows import Rows, collate, row_id
from tasks.task import Task, in_words_of
from teacher.model import Forward, answers_of, device_of, generate, rows_at_once
from teacher.shards import Record, check_binding, revealed, sha256_of_file, write_shard
from teacher.signal import shows_states, states_of

SHARD_ROWS = 8192
SHARD_TOKENS = 2**19  # at most: what an interruption may cost
SHARD_BYTES = 2**30  # of whole distributions at most: a shard is held in memory until it is written
BATCH_ROWS = 512
RAREST_WORDS = 0.02  # a teacher that invents fewer well-formed words than this is given up


def name_of(recipe: Recipe) -> str:
    """The folder of the outputs that a recipe needs: recipes that need the same share it."""
    teachers = recipe.teachers if recipe.teachers != ["teacher"] else []
    access = {"top_k": f"top_{recipe.k}", "sampled": f"sampled_{recipe.k}"}
    parts = [*teachers, recipe.sequences, access.get(recipe.access, recipe.access)]
    parts += map(str, recipe.hidden_layers)
    parts += ["relations"] if recipe.relations else []
    if recipe.stored_as != "float16":
        parts.append(recipe.stored_as)
    if recipe.sequences == "teacher":
        parts += [recipe.prompts]
        if recipe.sampling_temperature:
            parts.append(f"sampled-{recipe.sampling_temperature:g}")
    if recipe.transfer_rows:
        parts.append(str(recipe.transfer_rows))
    return "-".join(parts)


def needs_outputs(recipe: Recipe) -> bool:
    """Does a teacher have to answer before students of this recipe can train?"""
    return recipe.access != "none" and recipe.sequences != "student"


def stage_of_teacher(name: str, config: Config, seed: int | None = None) -> str:
    """`teacher`, `twin`, or a recipe's first student, or its student of a seed."""
    if name not in config.recipes:
        return name
    return f"students/{name}/seed-{config.seeds[0] if seed is None else seed}"


def charged_stages(recipe: Recipe, config: Config, everything: bool = False) -> list[str]:
    """What has to be paid before a student of this recipe can train: its outputs (not if the recipe
    says so, but with `everything` always), and an assistant that taught it or gave it its layers.
    The teacher itself was there before."""
    pays = recipe.charged or everything
    stages = [f"outputs/{name_of(recipe)}"] if needs_outputs(recipe) and pays else []
    for name in recipe.teachers:
        if name in config.recipes and (recipe.access != "none" or recipe.initial_layers):
            stages += [stage_of_teacher(name, config)]
            stages += charged_stages(config.recipes[name], config, everything=True)
    return list(dict.fromkeys(stages))


def outputs_binding(
    recipe: Recipe, teacher_sha256: str, tokenizer_sha256: str, rows: Rows, seed: int
) -> dict[str, Any]:
    """What outputs are bound to: if any of this differs they are another teacher's outputs."""
    writes = recipe.sequences == "teacher"
    return {
        "teacher": teacher_sha256,
        "tokenizer": tokenizer_sha256,
        "rows": rows.digest(),
        "access": recipe.access,
        "k": recipe.k if recipe.access in ("top_k", "sampled") else None,
        "stored_as": recipe.stored_as,
        "hidden_layers": list(recipe.hidden_layers),
        **({"relations": True} if recipe.relations else {}),
        "sequences": recipe.sequences,
        "prompts": recipe.prompts,
        "transfer_rows": recipe.transfer_rows,
        "sampling_temperature": recipe.sampling_temperature if writes else None,
        "seed": seed,
    }


def known_rows(rows: Rows, recipe: Recipe) -> int:
    """How many of the rows that a teacher answers ask what the data ask; the rest it invents."""
    if recipe.prompts == "invented":
        return 0
    count = recipe.transfer_rows or len(rows)
    return min(count, len(rows)) if recipe.prompts == "extended" else count


def transfer_rows(
    rows: Rows, recipe: Recipe, start: int = 0, size: int | None = None
) -> np.ndarray:
    """Places of the rows that a teacher answers, drawn evenly: rows come in dictionary order."""
    count = known_rows(rows, recipe)
    size = count - start if size is None else size
    return np.arange(start, start + size) * len(rows) // count


def make_outputs(
    folder: Path,
    forward: Forward,
    task: Any,
    rows: Rows,
    recipe: Recipe,
    binding: dict[str, Any],
    progress: Callable[[int], None] = lambda rows: None,
    process: int = 0,
    processes: int = 1,
    own: Task | None = None,
) -> None:
    """Write the teacher's outputs for `rows`, shard by shard; shards already there are kept. `own`:
    the task in the teacher's words, where they are others than the student's.

    A killed run goes on at the first missing shard: what a shard holds depends on the rows, the
    seed and the shard's number alone. Several processes share the shards.
    """
    folder.mkdir(parents=True, exist_ok=True)
    provenance = folder / "provenance.json"
    if provenance.exists():
        check_binding(folder, read_json(provenance)["binding"], binding)
    else:
        write_json(provenance, {"binding": binding, "shards": None})
    count, known = recipe.transfer_rows or len(rows), known_rows(rows, recipe)
    answer = partial(written, own=own or task) if recipe.sequences == "teacher" else scored
    taken: set[bytes] = set()
    if 0 < known < count:
        taken = {bytes_of(rows.prompt(i)) for i in range(len(rows))}
    shard_rows = rows_of_shard(recipe, task.longest_answer, len(task.tokenizer))
    for number, start in enumerate(range(0, count, shard_rows)):
        file = folder / f"shard-{number:05d}.arrow"
        size = min(shard_rows, count - start)
        if number % processes == process and not file.exists():
            generator = torch.Generator().manual_seed(binding["seed"] * 1_000_003 + number)
            parts, asked = [], min(size, max(0, known - start))
            if asked:
                picked = rows.take(transfer_rows(rows, recipe, start, asked))
                parts += [answer(forward, task, picked, recipe, generator, progress)]
            if asked < size:
                more = size - asked
                parts += [invented(forward, task, more, recipe, generator, progress, taken)]
            write_shard(file, chain(*parts), forward, len(task.tokenizer))


def rows_of_shard(recipe: Recipe, longest: int, vocabulary: int) -> int:
    """How many rows a shard has, of answers of so many tokens at most."""
    at_most = min(SHARD_ROWS, SHARD_TOKENS // longest)
    if recipe.access in ("logits", "hidden"):
        at_most = min(at_most, SHARD_BYTES // (2 * longest * vocabulary))
    return max(1, at_most)


@dataclass(frozen=True)
class Made:
    """What all shards hold together: FLOPs they took, those of an interrupted part too, as each
    says; tokens that something was revealed for; rows with different prompts."""

    flops: float
    tokens: int
    different: int


def finish_outputs(folder: Path) -> Made:
    """Enter the hashes of all shards: the outputs can be read."""
    provenance = folder / "provenance.json"
    shards, flops, tokens, ids = {}, 0.0, 0, []
    for file in sorted(folder.glob("shard-*.arrow")):
        shards[file.name] = sha256_of_file(file)
        try:
            with pa.memory_map(str(file)) as source:
                table = pa.ipc.open_stream(source).read_all()
            metadata = table.schema.metadata
            flops, tokens = flops + float(metadata[b"flops"]), tokens + int(metadata[b"tokens"])
            ids.append(table["id"].to_numpy())
        except (pa.ArrowInvalid, TypeError, KeyError):
            raise LabError(
                f"{file} is damaged; delete it and run train.py on the config again"
            ) from None
    write_json(provenance, {"binding": read_json(provenance)["binding"], "shards": shards})
    return Made(flops, tokens, len(np.unique(np.concatenate(ids))))


def sha256_of_outputs(folder: Path) -> str:
    """One hash over the shards of a finished folder."""
    shards = read_json(folder / "provenance.json")["shards"]
    return hashlib.sha256("".join(shards.values()).encode()).hexdigest()


def scored(
    forward: Forward,
    task: Any,
    rows: Rows,
    recipe: Recipe,
    generator: torch.Generator,
    progress: Callable,
) -> Iterator[Record]:
    """Sequences `data`: the teacher reads the data's own completions and says what it expected."""
    order = np.argsort(rows.lengths, kind="stable")
    records: list[Record | None] = [None] * len(rows)
    layers = recipe.hidden_layers
    at_once = rows_at_once(BATCH_ROWS, int(rows.lengths.max()), len(task.tokenizer))
    for indices in np.array_split(order, -(-len(rows) // at_once)):
        batch = collate(rows, indices, task.tokenizer.pad_token_id)
        with torch.no_grad():
            output = forward(
                batch.input_ids.to(device_of(forward)), **shows_states(layers, recipe.relations)
            )
        logits = output.logits.cpu()[batch.counted][:, : len(task.tokenizer)]  # no padding of it
        log_probs = torch.log_softmax(logits, -1)
        log_probs = log_probs.split(batch.counted.sum(1).tolist())
        hidden, attention = (
            (shown.cpu() for shown in states_of(output, layers, recipe.relations))
            if layers
            else (None, None)
        )
        for place, i in enumerate(indices):
            n = rows.lengths[i] - 1
            records[i] = Record(
                int(rows.ids[i]),
                rows.row(i),
                int(rows.prompt_lengths[i]),
                revealed(
                    log_probs[place],
                    recipe,
                    generator,
                    hidden[place, :n] if layers else None,
                    attention[place, :n, ..., :n] if layers else None,
                ),
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
    own: Task,
) -> Iterator[Record]:
    """Sequences `teacher`: it answers the rows' prompts, in batches of nearly one prompt length."""
    records: list[Record | None] = [None] * len(rows)
    answers = answers_of(
        forward,
        in_words_of(own, task, rows),
        BATCH_ROWS,
        longest=own.longest_answer,
        end=own.tokenizer.eos_token_id,
        temperature=recipe.sampling_temperature,
        generator=generator,
        keep_log_probs=recipe.access != "text",
        keep_layers=recipe.hidden_layers,
        keep_relations=recipe.relations,
        vocabulary=len(own.tokenizer),
    )
    for i, answer in answers:
        tokens, log_probs = answer.tokens.numpy(), answer.log_probs
        if own is not task:
            tokens, log_probs = translated(own, task, tokens, log_probs)
        records[i] = Record(
            int(rows.ids[i]),
            np.concatenate([rows.prompt(i), tokens]),
            int(rows.prompt_lengths[i]),
            revealed(log_probs, recipe, generator, answer.hidden, answer.attention),
        )
        progress(1)
    yield from records


def translated(
    own: Task, task: Task, tokens: np.ndarray, log_probs: Tensor | None
) -> tuple[np.ndarray, Tensor | None]:
    """An answer of n tokens of the teacher as the m tokens of the student, and log-probabilities
    [m, V] of the teacher beside them: the i-th of its own beside the i-th, the last beside all that
    follow (Boizard et al. 2024 (ULD), arXiv 2402.12030, section 3, cut the longer text off)."""
    ids = task.encode_answer(own.render(tokens.tolist()))
    if tokens[-1] == own.tokenizer.eos_token_id or not ids:
        ids = [*ids, task.tokenizer.eos_token_id]
    if log_probs is not None:
        log_probs = log_probs[np.minimum(np.arange(len(ids)), len(log_probs) - 1)]
    return np.asarray(ids, np.int64), log_probs


def bytes_of(prompt: np.ndarray) -> bytes:
    return prompt.astype(np.int32).tobytes()


def invented(
    forward: Forward,
    task: Any,
    count: int,
    recipe: Recipe,
    generator: torch.Generator,
    progress: Callable,
    taken: set[bytes],
) -> Iterator[Record]:
    """Prompts that are not the data's: the teacher writes whole rows, words of its own and their
    answers.

    A word that is not well formed, that belongs to a split which must stay unseen, or whose prompt
    is `taken`, is dropped. It may be invented twice; then both rows have one id.
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
            keep_relations=recipe.relations,
            vocabulary=len(task.tokenizer),
        )
        for written_row in rows:
            row = np.concatenate([[task.tokenizer.bos_token_id], written_row.tokens.numpy()])
            prompt_length = task.invented_prompt_length(row)
            if prompt_length is None or made == count or bytes_of(row[:prompt_length]) in taken:
                continue
            made += 1
            progress(1)
            log_probs = written_row.log_probs
            log_probs = None if log_probs is None else log_probs[prompt_length - 1 :]
            states = written_row.hidden, written_row.attention
            yield Record(
                row_id(f"{task.name} {row[:prompt_length].tolist()}"),
                row,
                prompt_length,
                revealed(log_probs, recipe, generator, *states),
            )
