"""Fidelity: how closely a student's distributions follow the teacher's, position by position.

Everything is kept per row as sums over its M counted positions, so that any mean over rows, and
any bootstrap of it, is a ratio of sums. Divergences are at temperature 1, in nats per token,
whatever the objective was.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from teacher.signal import finite

ECE_BINS = 15


@dataclass(frozen=True)
class Expectations:
    """The distributions of teacher and student at M positions, in double precision: logits [M, V]
    of each, and the targets [M] that follow. teacher_logits: None where they are unknown."""

    teacher_logits: Tensor | None
    student_logits: Tensor
    targets: Tensor

    @cached_property
    def teacher(self) -> Tensor:
        """Log-probabilities [M, V]."""
        return finite(torch.log_softmax(self.teacher_logits.double(), dim=-1))

    @cached_property
    def student(self) -> Tensor:
        """Log-probabilities [M, V]."""
        return finite(torch.log_softmax(self.student_logits.double(), dim=-1))


def kl_teacher_student(at: Expectations) -> Tensor:
    """KL(teacher || student), [M] nats."""
    return (at.teacher.exp() * (at.teacher - at.student)).sum(-1)


def kl_student_teacher(at: Expectations) -> Tensor:
    """KL(student || teacher), [M] nats."""
    return (at.student.exp() * (at.student - at.teacher)).sum(-1)


def top1_agreement(at: Expectations) -> Tensor:
    """Whether both have the same most likely token, [M]."""
    return (at.teacher.argmax(-1) == at.student.argmax(-1)).double()


def nll_gap(at: Expectations) -> Tensor:
    """The student's negative log-likelihood of the target minus the teacher's, [M] nats; negative
    where the student is better."""
    return (at.teacher - at.student).gather(-1, at.targets[:, None])[:, 0]


def nll(at: Expectations) -> Tensor:
    """The student's negative log-likelihood of the target, [M] nats."""
    return -at.student.gather(-1, at.targets[:, None])[:, 0]


def entropy(at: Expectations) -> Tensor:
    """The student's entropy, [M] nats."""
    return -(at.student.exp() * at.student).sum(-1)


def calibration(at: Expectations) -> Tensor:
    """[M, 3 * ECE_BINS]: per position, in the bin of the student's confidence, a count, the
    confidence and whether the most likely token was right. Column sums give the ECE of any rows."""
    confidence, likeliest = torch.softmax(at.student_logits.double(), dim=-1).max(-1)
    which = (confidence * ECE_BINS).long().clamp_max(ECE_BINS - 1)
    shape = (len(at.targets), 3, ECE_BINS)
    columns = at.student_logits.new_zeros(shape, dtype=torch.float64)
    place = torch.arange(len(at.targets), device=at.student_logits.device)
    columns[place, 0, which] = 1
    columns[place, 1, which] = confidence
    columns[place, 2, which] = (likeliest == at.targets).double()
    return columns.flatten(1)


def sum_by_row(values: Tensor, positions: list[int]) -> Tensor:
    """[M, ...] -> [rows, ...], where row i has positions[i] consecutive entries."""
    row = torch.repeat_interleave(torch.arange(len(positions)), torch.tensor(positions))
    out = torch.zeros(len(positions), *values.shape[1:], dtype=torch.float64)
    return out.index_add_(0, row, values.double())
