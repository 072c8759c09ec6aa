"""Evaluate a model, teacher-forced and free-running, against its teacher on the rows of a split."""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from measure.fidelity import Expectations, entropy, nll, sum_by_row
from measure.metrics import METRICS
from measure.statistics import Estimate, ratio
from models.generate import MAX_NUMBERS, answers_of, rows_at_once
from models.language import Forward, device_of, logits_at
from models.rows import Rows, collate
from tasks.task import Metric, Task
from teacher.source import prompts_for

BATCH_ROWS = 512
COMPARED_NUMBERS = 2**22  # logits compared at a time; larger tensors are slow to allocate


@dataclass
class Answers:
    """A model's answers to the prompts of N rows: texts, and their log-probabilities in nats."""

    texts: list[str]
    log_probs: np.ndarray


def free_running(forward: Forward, task: Task, rows: Rows) -> Answers:
    """Greedy answers to every row's prompt, shorter if a prompt leaves too little room in a row."""
    texts: list[str] = [""] * len(rows)
    log_probs = np.zeros(len(rows))
    for i, answer in answers_of(
        forward,
        rows,
        BATCH_ROWS,
        longest=min(task.longest_answer, task.longest_row - int(rows.prompt_lengths.max())),
        end=task.end,
        vocabulary=task.vocabulary,
    ):
        texts[i] = task.render(answer.tokens.tolist())
        log_probs[i] = answer.log_prob
    return Answers(texts, log_probs)


@torch.no_grad()
def completion_logits(
    forward: Forward, task: Task, rows: Rows, indices: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Teacher-forced logits [M, V] and targets [M] at the completion positions of some rows, row
    by row, and how many positions each has; on the model's device."""
    batch = collate(rows, indices, task.pad)
    device = device_of(forward)
    output = forward(batch.input_ids.to(device), use_cache=False)
    positions = batch.counted.sum(1).tolist()
    return logits_at(output, batch, task.vocabulary), batch.targets.to(device), positions


@dataclass
class Evaluation:
    """One model on one split: its answers, and the per-row sums behind every metric."""

    answers: Answers
    columns: dict[str, np.ndarray]  # [rows], or [rows, C] for metrics with their own statistic


class TeacherReference:
    """The teacher on the rows of one split, compared with every student, batch by batch. Its logits
    are kept if they are few, and recomputed otherwise. own_task: the task with the teacher's
    tokenizer; if that is another one, only answers can be compared."""

    def __init__(
        self, teacher: Forward, task: Task, rows: Rows, own_task: Task | None = None
    ) -> None:
        self.teacher, self.task, self.rows = teacher, task, rows
        self.own_task = own_task or task
        self.compares_tokens = self.own_task is task
        self.divide()
        prompts = prompts_for(self.own_task, task, rows)
        self.answers = free_running(teacher, self.own_task, prompts)
        self.evaluation = self.compare(self.answers, teacher if self.compares_tokens else None)

    def divide(self) -> None:
        """The rows in batches of similar lengths."""
        task, rows = self.task, self.rows
        order = np.argsort(rows.lengths, kind="stable")
        longest, vocabulary = int(rows.lengths.max()), task.vocabulary
        at_once = rows_at_once(BATCH_ROWS, longest, vocabulary, COMPARED_NUMBERS)
        self.batches = np.array_split(order, -(-len(rows) // at_once))
        positions = int((rows.lengths - rows.prompt_lengths).sum())
        self.keeps_logits = positions * task.vocabulary <= MAX_NUMBERS
        self.kept: dict[int, torch.Tensor] = {}

    def evaluate(self, model: Forward) -> Evaluation:
        """Give a model the same prompts, and compare."""
        return self.compare(free_running(model, self.task, self.rows), model)

    def teacher_logits(self, number: int) -> torch.Tensor | None:
        """The teacher's logits of a batch, kept or recomputed; None if they are not comparable."""
        if not self.compares_tokens:
            return None
        if number in self.kept:
            return self.kept[number]
        logits, _, _ = completion_logits(self.teacher, self.task, self.rows, self.batches[number])
        if self.keeps_logits:
            self.kept[number] = logits
        return logits

    def compare(self, answers: Answers, model: Forward | None) -> Evaluation:
        """Columns: those of the task; one for every metric over positions, and `positions`; `bits`
        and `entropy` of the model; `same`, whether the answer equals the teacher's. model: None if
        only its answers are known."""
        per_position = {
            name: metric.positions
            for name, metric in METRICS.items()
            if metric.positions and (self.compares_tokens or not metric.needs_teacher)
        }
        per_position |= {"entropy": entropy, "nll": nll}
        columns: dict[str, np.ndarray] = {}
        for number, indices in enumerate(self.batches if model is not None else []):
            teacher = self.teacher_logits(number)
            logits, targets, positions = completion_logits(model, self.task, self.rows, indices)
            expectations = Expectations(teacher, logits, targets)
            for name, function in per_position.items():
                sums = sum_by_row(function(expectations).cpu(), positions).numpy()
                column = columns.setdefault(name, np.empty((len(self.rows), *sums.shape[1:])))
                column[indices] = sums
        if "nll" in columns:
            columns["bits"] = columns["nll"] / math.log(2)
        same = [a == b for a, b in zip(answers.texts, self.answers.texts, strict=True)]
        positions = self.rows.lengths - self.rows.prompt_lengths
        columns |= {"positions": positions.astype(float), "same": np.asarray(same, float)}
        columns |= self.task.agree(answers.texts, self.answers.texts)
        columns |= self.task.grade(self.rows.ids[np.arange(len(self.rows))], answers.texts)
        return Evaluation(answers, columns | {"rows": np.ones(len(self.rows))})

    def metrics(
        self, seeds: list[Evaluation], is_one_model: bool = False
    ) -> dict[str, dict[str, Estimate]]:
        """{"quality": ..., "fidelity": ...} of one model, over its seeds. is_one_model: a teacher,
        which has none."""
        wrong = self.evaluation.columns.get("wrong")
        if wrong is not None:
            for one in seeds:
                one.columns |= {"errors": wrong, "copied": one.columns["same"] * wrong}
        groups = {"quality": self.task.metrics, "fidelity": {**self.task.agreement, **METRICS}}
        return {
            group: {
                name: replace(estimate, is_one_model=is_one_model)
                for name, estimate in self.estimates(metrics, seeds).items()
            }
            for group, metrics in groups.items()
        }

    def estimates(self, metrics: dict[str, Metric], seeds: list[Evaluation]) -> dict[str, Estimate]:
        """The metrics that these rows can estimate: no accuracy at 6 steps if no problem has 6."""
        units = self.task.units(self.rows.ids[np.arange(len(self.rows))])

        def stacked(columns: list[np.ndarray]) -> np.ndarray:
            """[rows, ...] of every seed -> [seeds, units, ...]: intervals are over units."""
            if units is None:
                return np.stack(columns)
            sums = np.zeros((len(columns), units.max() + 1, *columns[0].shape[1:]))
            for total, values in zip(sums, columns, strict=True):
                np.add.at(total, units, values)
            return sums

        found = {}
        for name, metric in metrics.items():
            top = name if metric.positions else metric.numerator
            bottom = "positions" if metric.positions else metric.denominator
            if not all(column in seeds[0].columns for column in (top, bottom)):
                continue
            if metric.statistic:
                values = [one.columns[top] for one in seeds]
            elif seeds[0].columns[bottom].any():
                values = [np.stack([s.columns[top], s.columns[bottom]], axis=-1) for s in seeds]
            else:
                continue
            found[name] = Estimate.of(stacked(values), metric.statistic or ratio)
        return found


class RecordedReference(TeacherReference):
    """A teacher of which only its answers to the rows of a split are known."""

    def __init__(self, answers: list[str], task: Task, rows: Rows) -> None:
        self.task, self.rows, self.compares_tokens = task, rows, False
        self.divide()
        self.answers = Answers(answers, np.full(len(rows), np.nan))
        self.evaluation = self.compare(self.answers, None)


def summaries(
    estimates: dict[str, dict[str, Estimate]],
    metrics: dict[str, Metric],
    *,
    is_teacher: bool,
    writes_reasoning: bool,
) -> dict[str, dict[str, Any]]:
    """The estimates as they are reported: without a teacher's fidelity to itself, and only metrics
    of final answers for a model that was not trained to reason."""
    return {
        group: {
            name: estimate.summary()
            for name, estimate in found.items()
            if not (is_teacher and metrics[name].needs_teacher)
            and (writes_reasoning or metrics[name].final_answer)
        }
        for group, found in estimates.items()
    }
