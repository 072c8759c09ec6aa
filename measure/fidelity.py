"""Fidelity: how closely a student's distributions follow the teacher's, position by position.

Everything is kept per row as sums over its M counted positions, so that any mean over rows, and
any bootstrap of it, is a ratio of sums. Divergences are at temperature 1, in nats per token,
whatever the objective was.
"""

import torch
from torch import Tensor

ECE_BINS = 15


def compare(teacher_logits: Tensor, student_logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """[M, V], [M, V], [M] -> per position [M]: both KL divergences, whether the likeliest tokens
    agree, the student's excess negative log-likelihood of the target (may be negative), and its
    entropy in nats."""
    teacher = torch.log_softmax(teacher_logits.double(), dim=-1)
    student = torch.log_softmax(student_logits.double(), dim=-1)
    at_target = (teacher - student).gather(-1, targets[:, None])[:, 0]
    return {
        "kl_teacher_student": (teacher.exp() * (teacher - student)).sum(-1),
        "kl_student_teacher": (student.exp() * (student - teacher)).sum(-1),
        "top1_agreement": (teacher.argmax(-1) == student.argmax(-1)).double(),
        "nll_gap": at_target,
        "entropy": -(student.exp() * student).sum(-1),
    }


def calibration_columns(logits: Tensor, targets: Tensor) -> Tensor:
    """[M, V], [M] -> [M, 3 * ECE_BINS]: per position, in the bin of its confidence, a count, the
    confidence and whether the likeliest token was right. Column sums give the ECE of any rows."""
    confidence, likeliest = torch.softmax(logits.double(), dim=-1).max(-1)
    which = (confidence * ECE_BINS).long().clamp_max(ECE_BINS - 1)
    columns = logits.new_zeros((len(targets), 3, ECE_BINS), dtype=torch.float64)
    place = torch.arange(len(targets), device=logits.device)
    columns[place, 0, which] = 1
    columns[place, 1, which] = confidence
    columns[place, 2, which] = (likeliest == targets).double()
    return columns.flatten(1)


def sum_by_row(values: Tensor, positions: list[int]) -> Tensor:
    """[M, ...] -> [rows, ...], where row i has positions[i] consecutive entries."""
    row = torch.repeat_interleave(torch.arange(len(positions)), torch.tensor(positions))
    out = torch.zeros(len(positions), *values.shape[1:], dtype=torch.float64)
    return out.index_add_(0, row, values.double())
