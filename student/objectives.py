"""The objectives: how a student's distribution is compared with what the teacher revealed.

Each takes student_logits [M, V] and a Signal over the same M positions and returns [M] nats per
position; the loop divides the sum by the number of positions. Notation: p teacher, q student,
both softened by the temperature T. Divergences carry T^2, which keeps their gradient at the scale
of T = 1 (Hinton, Vinyals and Dean 2015, arXiv 1503.02531, section 2.1).
"""

import torch
from torch import Tensor

from teacher.signal import Signal


def cross_entropy(student_logits: Tensor, signal: Signal) -> Tensor:
    """-log q(target): learning from text alone, at temperature 1. [M, V] -> [M] nats.

    On text that the teacher wrote this is sequence-level distillation (Kim and Rush 2016,
    arXiv 1606.07947, section 3.2).
    """
    return torch.nn.functional.cross_entropy(student_logits, signal.targets, reduction="none")


def forward_kl(student_logits: Tensor, signal: Signal, temperature: float = 1.0) -> Tensor:
    """T^2 KL(p || q) = T^2 sum p (log p - log q): the student must cover all that the teacher
    deems likely. [M, V] -> [M] nats. Hinton et al. 2015, arXiv 1503.02531, section 2; zero at
    q = p, as the teacher's entropy is subtracted.
    """
    teacher, student = signal.outcomes(student_logits, temperature)
    return temperature**2 * (teacher.exp() * (teacher - student)).sum(-1)


def reverse_kl(student_logits: Tensor, signal: Signal, temperature: float = 1.0) -> Tensor:
    """T^2 KL(q || p): the student must avoid what the teacher deems unlikely. [M, V] -> [M] nats.

    Gu et al. 2023 (MiniLLM), arXiv 2306.08543, equation 1, per token.
    """
    teacher, student = signal.outcomes(student_logits, temperature)
    return temperature**2 * (student.exp() * (student - teacher)).sum(-1)


def generalised_jsd(
    student_logits: Tensor, signal: Signal, temperature: float = 1.0, beta: float = 0.5
) -> Tensor:
    """T^2 [beta KL(p || m) + (1 - beta) KL(q || m)], m = beta p + (1 - beta) q. [M, V] -> [M].

    Agarwal et al. 2023 (GKD), arXiv 2306.13649, equation 1. Divided by beta it tends to forward
    KL as beta -> 0; divided by 1 - beta, to reverse KL as beta -> 1. Bounded by log 2 nats.
    """
    teacher, student = signal.outcomes(student_logits, temperature)
    weights = torch.tensor([beta, 1 - beta], dtype=student.dtype, device=student.device).log()
    mixture = torch.logsumexp(torch.stack([teacher + weights[0], student + weights[1]]), dim=0)
    to_teacher = (teacher.exp() * (teacher - mixture)).sum(-1)
    to_student = (student.exp() * (student - mixture)).sum(-1)
    return temperature**2 * (beta * to_teacher + (1 - beta) * to_student)
