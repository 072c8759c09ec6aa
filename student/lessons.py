"""What a student learns from: rows, and the signal at the positions of a batch of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.optimize import brentq
from torch import nn

from configs.schema import LabError
from tasks.rows import Batch, Rows
from tasks.task import Task
from teacher.signal import Inside, Signal

if TYPE_CHECKING:
    from student.on_policy import OnPolicy


def text_signal(batch: Batch) -> Signal:
    """The text itself and no more."""
    return Signal(batch.targets)


@dataclass(frozen=True)
class Lessons:
    """Rows and what is revealed at a batch of them. Without a teacher that is the text itself;
    with access `hidden`, its `inside` too, of width W. At the steps of `on_policy` the lessons are
    others, made on the spot for so many `flops`, of which the writing took so many seconds."""

    rows: Rows
    signal: Callable[[Batch], Signal] = text_signal
    inside: Callable[[Batch], Inside] | None = None
    width: int = 0
    on_policy: "OnPolicy | None" = None
    flops: float = 0.0
    writing_seconds: float = 0.0

    def at(self, student: nn.Module, step: int, progress: float) -> "Lessons":
        """The lessons of a step: these, or what the student just wrote."""
        if self.on_policy is None or not self.on_policy.due(step, progress):
            return self
        return self.on_policy.lessons(student, step)


def scarce(rows: Rows, fraction: float) -> Rows:
    """The share of rows that somebody without the data could label: those of the lowest ids.

    Ids are hashes, so the choice is random, the same on every machine, and smaller shares are
    parts of larger ones.
    """
    keep = np.argsort(rows.ids, kind="stable")[: max(1, round(len(rows) * fraction))]
    return rows.take(np.sort(keep))


def answers_alone(rows: Rows, task: Task) -> Rows:
    """The same rows without the reasoning before their answers, but for those that came to none.
    LabError if none did."""
    answers = [task.without_trace(rows.completion(i).tolist()) for i in range(len(rows))]
    answered = [i for i, answer in enumerate(answers) if answer]
    if not answered:
        raise LabError(
            "no row came to an answer, so that traces: none leaves nothing to learn from; use a "
            "better teacher or more transfer_rows"
        )
    ids = rows.ids[np.asarray(answered)].tolist()
    prompts = [rows.prompt(i).tolist() for i in answered]
    return Rows.build(ids, prompts, [answers[i] for i in answered])


def smoothed_labels(vocabulary: int, entropy: float) -> Callable[[Batch], Signal]:
    """Label smoothing whose entropy in nats matches the teacher's mean entropy.

    The label gets 1 - epsilon, and epsilon is spread over all V outcomes (Szegedy et al. 2016,
    arXiv 1512.00567, section 7).
    """

    def entropy_at(epsilon: float) -> float:
        other = epsilon / vocabulary
        label = 1 - epsilon + other
        return -label * np.log(label) - (vocabulary - 1) * other * np.log(max(other, 1e-300))

    epsilon = brentq(lambda e: entropy_at(e) - entropy, 0, 1) if entropy > 0 else 0.0

    def signal(batch: Batch) -> Signal:
        labels = torch.nn.functional.one_hot(batch.targets, vocabulary).float()
        chances = (1 - epsilon) * labels + epsilon / vocabulary
        return Signal(batch.targets, chances.clamp_min(1e-12).log())

    return signal
