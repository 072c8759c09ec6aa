"""Sources of outputs: a source writes answers to prompts, or scores the answers in the data.

A local model can `score`, `answer` or `invent`; an endpoint (teacher/endpoint.py) can answer. Each
yields a `TeacherRow` as soon as it is made, with no more than was requested.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from configs.schema import LabError
from models.generate import answers_of, generate, rows_at_once
from models.language import Forward, charged, device_of, logits_at
from models.rows import Rows, collate, row_id
from models.states import states_of, states_options
from models.trimmed import Restricted
from tasks.task import Task
from teacher.signal import finite

BATCH_ROWS = 512
MEASURED_ROWS = 128  # of the answers, for the probability outside a trimmed vocabulary
MIN_WELL_FORMED = 0.02  # of the invented rows; with fewer the teacher is rejected


@dataclass(frozen=True)
class TeacherRow:
    """One row and what the teacher computed for it: tokens [L], the first prompt_length are the
    prompt; log_probs [L - prompt_length, V] at the completion; states [L - 1, layers, W] and maps
    [L - 1, maps, L - 1] (see `states_of`). index: its place among the rows that were asked."""

    index: int
    id: int
    tokens: np.ndarray
    prompt_length: int
    log_probs: Tensor | None = None
    states: Tensor | None = None
    maps: Tensor | None = None


class Source(Protocol):
    """Whatever answers prompts. flops: spent so far. bill: what it has cost beside the work of this
    machine, for the ledger, and origin: whose outputs they are; both empty if none were bought."""

    task: Task

    @property
    def flops(self) -> float: ...
    def bill(self) -> dict[str, Any]: ...
    def origin(self) -> dict[str, Any]: ...
    def close(self) -> None: ...
    def answer(
        self, rows: Rows, temperature: float, probabilities: bool, generator: torch.Generator
    ) -> Iterator[TeacherRow]: ...


@dataclass(frozen=True)
class LocalModel:
    """A model on this machine. task: what the students learn. layers and relations: the states to
    return. own_task: the task with the teacher's tokenizer, if that is another one."""

    forward: Forward
    task: Task
    layers: tuple[int, ...] = ()
    relations: bool = False
    own_task: Task | None = None

    @property
    def flops(self) -> float:
        return getattr(self.forward, "flops", 0.0)

    def bill(self) -> dict[str, Any]:
        return {}

    def origin(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass

    def score(self, rows: Rows) -> Iterator[TeacherRow]:
        """Score the completions of the data: the model's distribution at each of their tokens."""
        task, layers = self.task, self.layers
        order = np.argsort(rows.lengths, kind="stable")
        at_once = rows_at_once(BATCH_ROWS, int(rows.lengths.max()), task.vocabulary)
        for indices in np.array_split(order, -(-len(rows) // at_once)):
            batch = collate(rows, indices, task.pad)
            with torch.no_grad():
                ids = batch.input_ids.to(device_of(self.forward))
                output = self.forward(ids, **states_options(layers, self.relations))
            logits = logits_at(output, batch, task.vocabulary)
            log_probs = finite(torch.log_softmax(logits, -1))
            log_probs = log_probs.split(batch.counted.sum(1).tolist())
            if layers:
                states, maps = charged(self.forward, states_of, output, layers, self.relations)
            for place, i in enumerate(indices):
                n = rows.lengths[i] - 1
                yield TeacherRow(
                    int(i),
                    int(rows.ids[i]),
                    rows.row(i),
                    int(rows.prompt_lengths[i]),
                    log_probs[place],
                    states[place, :n] if layers else None,
                    maps[place, :n, ..., :n] if layers else None,
                )

    def answer(
        self, rows: Rows, temperature: float, probabilities: bool, generator: torch.Generator
    ) -> Iterator[TeacherRow]:
        """Answer the prompts of some rows, in batches of similar prompt lengths."""
        teacher_task = self.own_task or self.task
        model = getattr(self.forward, "model", self.forward)
        if isinstance(model, Restricted):
            yield from self.answer_as_whole(model, rows, temperature, probabilities, generator)
            return
        answers = answers_of(
            self.forward,
            prompts_for(teacher_task, self.task, rows),
            BATCH_ROWS,
            longest=teacher_task.longest_answer,
            end=teacher_task.end,
            temperature=temperature,
            generator=generator,
            keep_log_probs=probabilities,
            keep_layers=self.layers,
            keep_relations=self.relations,
            vocabulary=teacher_task.vocabulary,
        )
        for i, answer in answers:
            tokens, log_probs = answer.tokens.numpy(), answer.log_probs
            if log_probs is not None:
                log_probs = finite(log_probs)
            if teacher_task is not self.task:
                tokens, log_probs = retokenised(teacher_task, self.task, tokens, log_probs)
            yield TeacherRow(
                int(i),
                int(rows.ids[i]),
                np.concatenate([rows.prompt(i), tokens]),
                int(rows.prompt_lengths[i]),
                log_probs,
                answer.hidden,
                answer.maps,
            )

    def answer_as_whole(
        self,
        model: Restricted,
        rows: Rows,
        temperature: float,
        probabilities: bool,
        generator: torch.Generator,
    ) -> Iterator[TeacherRow]:
        """A model with more tokens than the task answers in all of them, and is translated."""
        if self.layers:
            raise LabError(
                "hidden states at the tokens of a larger vocabulary cannot be matched; use another "
                "access, or remove task.vocabulary"
            )
        most, prompts = (
            self.task.longest_answer,
            [model.prompt(rows.prompt(i)) for i in range(len(rows))],
        )
        asked = Rows.build(rows.ids[np.arange(len(rows))].tolist(), prompts, [[] for _ in prompts])
        with model.whole():
            for i, answer in answers_of(
                self.forward,
                asked,
                BATCH_ROWS,
                longest=most,
                end=int(model.ids[self.task.end]),
                temperature=temperature,
                generator=generator,
                keep_log_probs=probabilities,
                vocabulary=len(model.theirs),
            ):
                tokens, log_probs = model.translated(answer.tokens, answer.log_probs)
                yield TeacherRow(
                    int(i),
                    int(rows.ids[i]),
                    np.concatenate([rows.prompt(i), tokens[:most]]),
                    int(rows.prompt_lengths[i]),
                    None if log_probs is None else finite(log_probs[:most]),
                )

    def invent(
        self,
        count: int,
        temperature: float,
        probabilities: bool,
        generator: torch.Generator,
        taken: set[bytes],
    ) -> Iterator[TeacherRow]:
        """Write complete rows, prompts included.

        A row is dropped if it is malformed, or if its prompt belongs to an evaluation split or is
        `taken`. A prompt may be invented twice; then both rows have the same id.
        """
        task, made, tried = self.task, 0, 0
        start = torch.full((BATCH_ROWS, 1), task.tokenizer.bos_token_id)
        while made < count:
            if made < tried * MIN_WELL_FORMED:
                raise LabError(
                    f"the teacher rarely invents well-formed {task.item_noun} ({made} of {tried} "
                    "tries); train it longer or with a larger teacher.training.prompt_weight"
                )
            tried += BATCH_ROWS
            for answer in generate(
                self.forward,
                start,
                longest=task.longest_row - 1,
                end=task.end,
                temperature=temperature,
                generator=generator,
                separator=task.separator,
                keep_log_probs=probabilities,
                keep_layers=self.layers,
                keep_relations=self.relations,
                vocabulary=task.vocabulary,
            ):
                row = np.concatenate([[task.tokenizer.bos_token_id], answer.tokens.numpy()])
                length = task.invented_prompt_length(row)
                if length is None or made == count or bytes_of(row[:length]) in taken:
                    continue
                log_probs = answer.log_probs
                if log_probs is not None:
                    log_probs = finite(log_probs[length - 1 :])
                yield TeacherRow(
                    made,
                    row_id(f"{task.name} {row[:length].tolist()}"),
                    row,
                    length,
                    log_probs,
                    answer.hidden,
                    answer.maps,
                )
                made += 1


def outside_vocabulary(source: Source, answers: Callable[[], Rows]) -> dict[str, float]:
    """For the ledger: the mean probability that a teacher gives to tokens which its task lacks, at
    a sample of its answers; nothing if it lacks none."""
    forward = getattr(source, "forward", None)
    model = getattr(forward, "model", forward)
    if not isinstance(model, Restricted):
        return {}
    rows, found = answers(), []
    for indices in np.array_split(np.arange(min(MEASURED_ROWS, len(rows))), MEASURED_ROWS // 8):
        if len(indices):
            batch = collate(rows, indices, source.task.pad)
            found.append(model.outside(batch.input_ids.to(model.device), batch.counted))
    return {"probability_outside": float(torch.cat(found).mean())}


def prompts_for(own_task: Task, task: Task, rows: Rows) -> Rows:
    """The prompts of some rows in the tokens of `own_task`, the same task with another
    tokenizer."""
    if own_task is task:
        return rows
    prompts = [own_task.prompt(task.question(rows, i)) for i in range(len(rows))]
    return Rows.build(rows.ids[np.arange(len(rows))].tolist(), prompts, [[] for _ in prompts])


def retokenised(
    own_task: Task, task: Task, tokens: np.ndarray, log_probs: Tensor | None
) -> tuple[np.ndarray, Tensor | None]:
    """An answer of n teacher tokens as m student tokens, and log-probabilities [m, V] of the
    teacher: those of its i-th token at the i-th position; the last are repeated at the end (Boizard
    et al. 2024 (ULD), arXiv 2402.12030, section 3, truncate the longer text)."""
    ids = task.encode_answer(own_task.render(tokens.tolist()))
    if tokens[-1] == own_task.end or not ids:
        ids = [*ids, task.end]
    if log_probs is not None:
        log_probs = log_probs[np.minimum(np.arange(len(ids)), len(log_probs) - 1)]
    return np.asarray(ids, np.int64), log_probs


def bytes_of(prompt: np.ndarray) -> bytes:
    return prompt.astype(np.int32).tobytes()
