"""The objectives: how a student is compared with what the teacher revealed; the table OBJECTIVES.

Most take student_logits [M, V] and a Signal over the same M positions and return [M] nats per
position; the loop divides the sum by the number of positions. Notation: p teacher, q student,
both softened by the temperature T. Divergences carry T^2, which keeps their gradient at the scale
of T = 1 (Hinton, Vinyals and Dean 2015, arXiv 1503.02531, section 2.1); distances of first order
carry T, for the same reason. All are 0 at q = p. The last three compare hidden states instead, at
all P positions.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from teacher.signal import HiddenSignal, Signal

FLOOR = 1e-4  # added to attention probabilities before the logarithm


def cross_entropy(student_logits: Tensor, signal: Signal) -> Tensor:
    """-log q(target): learning only from text, at temperature 1. [M, V] -> [M] nats.

    On text that the teacher wrote this is sequence-level distillation (Kim and Rush 2016,
    arXiv 1606.07947, section 3.2).
    """
    return torch.nn.functional.cross_entropy(student_logits, signal.targets, reduction="none")


def policy_gradient(student_logits: Tensor, signal: Signal) -> Tensor:
    """-A log q(token): raises the probability of the tokens in the student's better-than-average
    answers, lowers that of the others. [M, V] -> [M]; only its gradient has a meaning.

    Shao et al. 2024 (DeepSeekMath), arXiv 2402.03300, equation 3 (GRPO), with one update per batch
    of answers, where the ratio to the old policy is 1 and no clipping occurs, and without a
    reference model. The advantages already weight answers of all lengths equally.
    """
    return signal.advantages.to(student_logits.dtype) * cross_entropy(student_logits, signal)


def forward_kl(student_logits: Tensor, signal: Signal, temperature: float = 1.0) -> Tensor:
    """T^2 KL(p || q) = T^2 sum p (log p - log q): mass-covering, the student must assign
    probability wherever the teacher does. [M, V] -> [M] nats. Hinton et al. 2015,
    arXiv 1503.02531, section 2; zero at q = p, as the teacher's entropy is subtracted.

    For a sampled signal, the mean of log p - log q over the outcomes drawn from p: value and
    gradient are those of the full divergence in expectation (Anshumann et al. 2025,
    arXiv 2503.16870, section 3).
    """
    if signal.weights is not None:
        teacher, student = signal.sampled(student_logits, temperature)
        return (signal.weights * (teacher - student)).sum(-1)
    teacher, student = signal.outcomes(student_logits, temperature)
    return temperature**2 * kl(teacher, student)


def reverse_kl(student_logits: Tensor, signal: Signal, temperature: float = 1.0) -> Tensor:
    """T^2 KL(q || p): mode-seeking, the student must avoid what the teacher finds unlikely.
    [M, V] -> [M] nats.

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

    Early in training forward KL fits the head and reverse KL the tail; w favours the one that lags,
    and is not differentiated. Wu et al. 2024, arXiv 2404.02657, section 4.
    """
    teacher, student = signal.outcomes(student_logits, temperature)
    with torch.no_grad():
        probabilities, order = teacher.exp().sort(-1, descending=True)
        gap = (probabilities - student.exp().gather(-1, order)).abs()
        in_head = probabilities.cumsum(-1) - probabilities < head
        total = gap.sum(-1)
        forward_share = torch.where(total > 0, (gap * in_head).sum(-1) / total, 0.5)
    both = forward_share * kl(teacher, student) + (1 - forward_share) * kl(student, teacher)
    return temperature**2 * both


def total_variation(student_logits: Tensor, signal: Signal, temperature: float = 1.0) -> Tensor:
    """T / 2 sum |p - q|: bounded and symmetric. [M, V] -> [M], at T = 1 from 0 to 1.

    Wen et al. 2023 (f-distill), arXiv 2307.15190, section 3.
    """
    teacher, student = signal.outcomes(student_logits, temperature)
    return temperature * (teacher.exp() - student.exp()).abs().sum(-1) / 2


def uld(student_logits: Tensor, signal: Signal, temperature: float = 1.0) -> Tensor:
    """T sum |p_(i) - q_(i)| over probabilities sorted by size: [M, V] and [M, U] -> [M].

    Compares how confident two models are, not in which token, so that it works across vocabularies:
    the shorter one is padded with zeros. Boizard et al. 2024 (ULD), arXiv 2402.12030, equation 4.
    """
    width = max(student_logits.shape[-1], signal.log_probs.shape[-1])
    sizes = []
    for logits in (signal.log_probs.to(student_logits.dtype), student_logits):
        found = torch.softmax(logits / temperature, -1).sort(-1, descending=True).values
        sizes.append(torch.nn.functional.pad(found, (0, width - found.shape[-1])))
    return temperature * (sizes[0] - sizes[1]).abs().sum(-1)


def kl(a: Tensor, b: Tensor) -> Tensor:
    """KL(a || b) of log-probabilities: [M, K] -> [M] nats."""
    return (a.exp() * (a - b)).sum(-1)


def mixture(a: Tensor, b: Tensor, share: float) -> Tensor:
    """log(share a + (1 - share) b) of log-probabilities, [M, K]."""
    return torch.logaddexp(a + math.log(share), b + math.log1p(-share))


# -- hidden states ---------------------------------------------------------------------------------


def hidden_mse(output: Any, hidden: HiddenSignal) -> Tensor:
    """Mean squared error to the teacher's states: projected [P, layers, W] -> [P]. TinyBERT,
    equation 8 (Jiao et al. 2019, arXiv 1909.10351); 1 for a student that predicts the mean, as the
    stored dimensions have variance 1.
    """
    return (output.projected - hidden.states).square().mean(dim=(1, 2))


def attention_kl(output: Any, hidden: HiddenSignal) -> Tensor:
    """KL(teacher || student) between their attention, in nats, the mean over layers:
    [P, layers, K] -> [P]. Wang et al. 2020 (MiniLM), arXiv 2002.10957, equation 5, but on the mean
    of the heads: which head attends where is arbitrary, and matching head by head made the student
    of `pronounce` worse. FLOOR keeps the logarithm finite where a probability is 0; the divergence
    is still 0 where both agree, and at most about 0.0005 nats lower elsewhere.
    """
    return divergence_of_maps(output.attention, hidden.attention)


def value_relation_kl(output: Any, hidden: HiddenSignal) -> Tensor:
    """The same divergence between their value relations: MiniLM, equation 8."""
    return divergence_of_maps(output.relations, hidden.relations)


def divergence_of_maps(student: Tensor, teacher: Tensor) -> Tensor:
    ratio = (teacher + FLOOR).log() - (student + FLOOR).log()
    return (teacher * ratio).sum(-1).mean(-1)


@dataclass(frozen=True)
class Objective:
    """One term of a loss.

    function: (student_logits [M, V], signal, temperature, **parameters) -> [M]; if `needs` is
    states or relations, (StudentOutput at P positions, HiddenSignal) -> [P]. needs: what the
    teacher must reveal (see teacher/access.py), or "reward". order: the power of T that the
    function is multiplied by; 0 if it takes no temperature. parameters: of the recipe's
    `divergence` section. projects: whether it compares the student's states through projections.
    """

    function: Callable[..., Tensor]
    needs: str
    order: int = 0
    parameters: tuple[str, ...] = ()
    projects: bool = False

    @property
    def over_states(self) -> bool:
        return self.needs in ("states", "relations")

    @property
    def compares_distributions(self) -> bool:
        return self.needs in ("samples", "outcomes", "distribution")


OBJECTIVES: dict[str, Objective] = {
    "cross_entropy": Objective(cross_entropy, "text"),
    "policy_gradient": Objective(policy_gradient, "reward"),
    "forward_kl": Objective(forward_kl, "samples", order=2),
    "reverse_kl": Objective(reverse_kl, "outcomes", order=2),
    "generalised_jsd": Objective(generalised_jsd, "outcomes", order=2, parameters=("beta",)),
    "skewed_forward_kl": Objective(skewed_forward_kl, "outcomes", order=2, parameters=("skew",)),
    "skewed_reverse_kl": Objective(skewed_reverse_kl, "outcomes", order=2, parameters=("skew",)),
    "adaptive_kl": Objective(adaptive_kl, "outcomes", order=2),
    "total_variation": Objective(total_variation, "outcomes", order=1),
    "uld": Objective(uld, "distribution", order=1),
    "hidden_mse": Objective(hidden_mse, "states", projects=True),
    "attention_kl": Objective(attention_kl, "states"),
    "value_relation_kl": Objective(value_relation_kl, "relations"),
}
