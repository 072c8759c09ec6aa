"""The objectives: how a student's distribution is compared with what the teacher revealed.

Each takes student_logits [M, V] and a Signal over the same M positions and returns [M] nats per
position; the loop divides the sum by the number of positions. Notation: p teacher, q student,
both softened by the temperature T. Divergences carry T^2, which keeps their gradient at the scale
of T = 1 (Hinton, Vinyals and Dean 2015, arXiv 1503.02531, section 2.1); distances of the first
order carry T, for the same reason. All are 0 at q = p.
"""

import math

import torch
from torch import Tensor

from teacher.signal import Signal


def cross_entropy(student_logits: Tensor, signal: Signal) -> Tensor:
    """-log q(target): learning from text alone, at temperature 1. [M, V] -> [M] nats.

    On text that the teacher wrote this is sequence-level distillation (Kim and Rush 2016,
    arXiv 1606.07947, section 3.2).
    """
    return torch.nn.functional.cross_entropy(student_logits, signal.targets, reduction="none")


def policy_gradient(student_logits: Tensor, signal: Signal) -> Tensor:
    """-A log q(token): more of the student's own tokens that were better than its average, fewer
    of those that were worse. [M, V] -> [M]; not a divergence, its value means nothing, its
    gradient does.

    Shao et al. 2024 (DeepSeekMath), arXiv 2402.03300, equation 3 (GRPO), with one update per batch
    of answers, where the ratio to the old policy is 1 and no clipping occurs, and without a
    reference model. The advantages carry what makes answers of any length count alike.
    """
    return signal.advantages.to(student_logits.dtype) * cross_entropy(student_logits, signal)


def forward_kl(student_logits: Tensor, signal: Signal, temperature: float = 1.0) -> Tensor:
    """T^2 KL(p || q) = T^2 sum p (log p - log q): the student must cover all that the teacher
    deems likely. [M, V] -> [M] nats. Hinton et al. 2015, arXiv 1503.02531, section 2; zero at
    q = p, as the teacher's entropy is subtracted.

    Of a sampled signal, the mean of log p - log q over the outcomes drawn from p: value and
    gradient are those of the full divergence in expectation (Anshumann et al. 2025,
    arXiv 2503.16870, section 3).
    """
    if signal.weights is not None:
        teacher, student = signal.drawn(student_logits, temperature)
        return (signal.weights * (teacher - student)).sum(-1)
    teacher, student = signal.outcomes(student_logits, temperature)
    return temperature**2 * kl(teacher, student)


def reverse_kl(student_logits: Tensor, signal: Signal, temperature: float = 1.0) -> Tensor:
    """T^2 KL(q || p): the student must avoid what the teacher deems unlikely. [M, V] -> [M] nats.

    Gu et al. 2023 (MiniLLM), arXiv 2306.08543, equation 1, per token.
    """
    teacher, student = signal.outcomes(student_logits, temperature)
    return temperature**2 * kl(student, teacher)


def generalised_jsd(
    student_logits: Tensor, signal: Signal, temperature: float = 1.0, beta: float = 0.5
) -> Tensor:
    """T^2 [beta KL(p || m) + (1 - beta) KL(q || m)], m = beta p + (1 - beta) q. [M, V] -> [M].

    Agarwal et al. 2023 (GKD), arXiv 2306.13649, equation 1. Divided by beta it tends to forward
    KL as beta -> 0; divided by 1 - beta, to reverse KL as beta -> 1. Bounded by log 2 nats.
    """
    teacher, student = signal.outcomes(student_logits, temperature)
    middle = mixture(teacher, student, beta)
    return temperature**2 * (beta * kl(teacher, middle) + (1 - beta) * kl(student, middle))


def skewed_forward_kl(
    student_logits: Tensor, signal: Signal, temperature: float = 1.0, skew: float = 0.1
) -> Tensor:
    """T^2 KL(p || skew p + (1 - skew) q): forward KL that stays finite, at most -log skew, and
    whose gradient does not explode where q is small. [M, V] -> [M] nats.

    Ko et al. 2024 (DistiLLM), arXiv 2402.03898, section 3.1.
    """
    teacher, student = signal.outcomes(student_logits, temperature)
    return temperature**2 * kl(teacher, mixture(teacher, student, skew))


def skewed_reverse_kl(
    student_logits: Tensor, signal: Signal, temperature: float = 1.0, skew: float = 0.1
) -> Tensor:
    """T^2 KL(q || (1 - skew) p + skew q): its mirror image. [M, V] -> [M] nats.

    Ko et al. 2024 (DistiLLM), arXiv 2402.03898, section 3.1.
    """
    teacher, student = signal.outcomes(student_logits, temperature)
    return temperature**2 * kl(student, mixture(student, teacher, skew))


def adaptive_kl(
    student_logits: Tensor, signal: Signal, temperature: float = 1.0, head: float = 0.5
) -> Tensor:
    """T^2 [w KL(p || q) + (1 - w) KL(q || p)], with w = the share of sum |p - q| that lies in the
    teacher's head: the fewest outcomes that hold at least `head` of p. [M, V] -> [M] nats.

    Early in a training forward KL fits the head and reverse KL the tail; w goes to whichever is
    behind, and is not differentiated. Wu et al. 2024, arXiv 2404.02657, section 4.
    """
    teacher, student = signal.outcomes(student_logits, temperature)
    with torch.no_grad():
        chances, order = teacher.exp().sort(-1, descending=True)
        gap = (chances - student.exp().gather(-1, order)).abs()
        in_head = chances.cumsum(-1) - chances < head
        whole = gap.sum(-1)
        forward_share = torch.where(whole > 0, (gap * in_head).sum(-1) / whole, 0.5)
    both = forward_share * kl(teacher, student) + (1 - forward_share) * kl(student, teacher)
    return temperature**2 * both


def total_variation(student_logits: Tensor, signal: Signal, temperature: float = 1.0) -> Tensor:
    """T / 2 sum |p - q|: bounded and symmetric. [M, V] -> [M], at T = 1 from 0 to 1.

    Wen et al. 2023 (f-distill), arXiv 2307.15190, section 3.
    """
    teacher, student = signal.outcomes(student_logits, temperature)
    return temperature * (teacher.exp() - student.exp()).abs().sum(-1) / 2


def sorted_distance(student_logits: Tensor, signal: Signal, temperature: float = 1.0) -> Tensor:
    """T sum |p_(i) - q_(i)| over probabilities sorted by size: [M, V] and [M, U] -> [M].

    Compares how sure two models are, not of what, so that it works across vocabularies: the
    shorter one is filled up with zeros. Boizard et al. 2024 (ULD), arXiv 2402.12030, equation 4.
    """
    width = max(student_logits.shape[-1], signal.log_probs.shape[-1])
    sizes = []
    for logits in (signal.log_probs.to(student_logits.dtype), student_logits):
        chances = torch.softmax(logits / temperature, -1).sort(-1, descending=True).values
        sizes.append(torch.nn.functional.pad(chances, (0, width - chances.shape[-1])))
    return temperature * (sizes[0] - sizes[1]).abs().sum(-1)


def kl(a: Tensor, b: Tensor) -> Tensor:
    """KL(a || b) of log-probabilities: [M, K] -> [M] nats."""
    return (a.exp() * (a - b)).sum(-1)


def mixture(a: Tensor, b: Tensor, share: float) -> Tensor:
    """log(share a + (1 - share) b) of log-probabilities, [M, K]."""
    return torch.logaddexp(a + math.log(share), b + math.log1p(-share))
