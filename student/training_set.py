"""What a model trains on: rows, the signal at their positions, and the order of the batches."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor, nn

from configs.schema import LabError
from models.rows import Batch, Rows
from tasks.task import Task
from teacher.signal import ComputedSignal, HiddenSignal, Signal


class Writer(Protocol):
    """A student that writes the rows of some steps itself (see student/on_policy.py)."""

    def due(self, step: int, progress: float) -> bool: ...

    def written(self, student: nn.Module, step: int) -> "TrainingSet": ...


def text_signal(batch: Batch) -> Signal:
    """Only the text."""
    return Signal(batch.targets)


@dataclass(frozen=True)
class TrainingSet:
    """Rows and the signal at a batch of them: the text itself without a teacher. `hidden` adds
    hidden states of width W. order: the rows of each step; None if every step takes all of them.
    In the steps of `on_policy` the student writes another training set, at a cost of `flops` and
    `writing_seconds`."""

    rows: Rows
    signal: Callable[[Batch], Signal | ComputedSignal] = text_signal
    hidden: Callable[[Batch], HiddenSignal] | None = None
    hidden_width: int = 0
    order: Callable[[int], np.ndarray] | None = None
    on_policy: Writer | None = None
    flops: float = 0.0
    writing_seconds: float = 0.0

    def at(self, student: nn.Module, step: int, progress: float) -> "TrainingSet":
        """The training set of a step: this one, or what the student just wrote."""
        if self.on_policy is None or not self.on_policy.due(step, progress):
            return self
        return self.on_policy.written(student, step)

    def indices(self, step: int) -> np.ndarray:
        """The rows of a step."""
        return np.arange(len(self.rows)) if self.order is None else self.order(step)


def lowest_ids(rows: Rows, fraction: float) -> Rows:
    """A fraction of the rows, those with the lowest ids. Ids are hashes, so the choice is random,
    the same on every machine, and smaller fractions are subsets of larger ones."""
    keep = np.argsort(rows.ids, kind="stable")[: max(1, round(len(rows) * fraction))]
    return rows.take(np.sort(keep))


def without_reasoning(rows: Rows, task: Task) -> Rows:
    """The same rows without the reasoning before their answers; rows without an answer are dropped.
    LabError if all are."""
    answers = [task.without_reasoning(rows.completion(i).tolist()) for i in range(len(rows))]
    answered = [i for i, answer in enumerate(answers) if answer]
    if not answered:
        raise LabError(
            "no row has an answer after its reasoning, so outputs.traces: none leaves nothing to "
            "learn from; use a better teacher or more outputs.transfer_rows"
        )
    ids = rows.ids[np.asarray(answered)].tolist()
    prompts = [rows.prompt(i).tolist() for i in answered]
    return Rows.build(ids, prompts, [answers[i] for i in answered])


def smoothed_labels(vocabulary: int, entropy: float) -> Callable[[Batch], ComputedSignal]:
    """Label smoothing whose entropy in nats matches the teacher's mean entropy.

    The label gets 1 - epsilon, and epsilon is spread over all V outcomes (Szegedy et al. 2016,
    arXiv 1512.00567, section 7).
    """

    def entropy_at(epsilon: float) -> float:
        other = epsilon / vocabulary
        label = 1 - epsilon + other
        return -label * np.log(label) - (vocabulary - 1) * other * np.log(max(other, 1e-300))

    epsilon = brentq(lambda e: entropy_at(e) - entropy, 0, 1) if entropy > 0 else 0.0

    def log_probs_of(targets: Tensor) -> Tensor:
        labels = torch.nn.functional.one_hot(targets, vocabulary).float()
        probabilities = (1 - epsilon) * labels + epsilon / vocabulary
        return probabilities.clamp_min(1e-12).log()

    return lambda batch: ComputedSignal(batch.targets, batch.targets, log_probs_of)
