"""What a teacher revealed at some positions of a text: all that an objective sees of a teacher."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

LOG_ZERO = -69.0  # nats: the log-probability of anything less likely than 1e-30


def finite(log_probs: Tensor) -> Tensor:
    """Some models exclude tokens by logits of -inf, and 0 * -inf is not 0: their log-probability
    becomes LOG_ZERO. NaN stays."""
    return log_probs.nan_to_num(nan=torch.nan, neginf=LOG_ZERO)


@dataclass(frozen=True)
class Signal:
    """M positions of text and what the teacher revealed there.

    targets [M]: the tokens of the text. log_probs, in nats at temperature 1: [M, V] of all
    outcomes, or [M, k] of those in indices [M, k]; None if only the text was revealed.
    tail [M]: the log-probability of all outcomes not in indices. weights [M, k]: where the outcomes
    were sampled, each one's share of the draws; padding has weight 0. advantages [M]: with a reward
    instead of a teacher, how much better the student's answer was than its other answers to the
    same prompt, at each of its tokens.

    A signal read from disk and one computed live are the same type.
    """

    targets: Tensor
    log_probs: Tensor | None = None
    indices: Tensor | None = None
    weights: Tensor | None = None
    advantages: Tensor | None = None
    tail: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor | None]:
        return [getattr(self, field.name) for field in fields(self)]

    def to(self, device: torch.device | str) -> "Signal":
        return Signal(*(t if t is None else t.to(device) for t in self.tensors))

    def part(self, start: int, stop: int) -> "Signal":
        """The signal at positions start to stop - 1."""
        return Signal(*(t if t is None else t[start:stop] for t in self.tensors))

    def take(self, indices: Tensor) -> "Signal":
        """The signal at some positions."""
        return Signal(*(t if t is None else t[indices] for t in self.tensors))

    def whole(self) -> "Signal":
        return self

    @staticmethod
    def joined(parts: "Sequence[Signal]") -> "Signal":
        columns = zip(*(part.tensors for part in parts), strict=True)
        return Signal(*(None if column[0] is None else torch.cat(column) for column in columns))

    def outcomes(self, student_logits: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """(teacher, student) log-probabilities over the same outcomes, each [M, K], normalised.

        Full log-probabilities: K = V, both softened by the temperature. Top-k: K = k + 1, where
        the last outcome is everything else. A divergence over these k + 1 outcomes is never
        negative, and never above the divergence over all V (data-processing inequality).
        """
        if self.log_probs is None:
            raise ValueError("this signal is only text: it has no distribution to compare with")
        if self.weights is not None:
            raise ValueError("a sampled signal can only estimate forward_kl")
        teacher = self.log_probs.to(student_logits.dtype)
        if self.indices is None:
            return (
                torch.log_softmax(teacher / temperature, dim=-1),
                torch.log_softmax(student_logits / temperature, dim=-1),
            )
        if temperature != 1:
            raise ValueError("top-k signals cannot be softened: the tail's shape is unknown")
        student = torch.log_softmax(student_logits, dim=-1)
        rest = tail_of(student, self.indices)
        teacher = torch.cat([teacher, self.tail.to(teacher.dtype)[:, None]], dim=-1)
        return (
            torch.log_softmax(teacher, dim=-1),  # stored values are rounded
            torch.cat([student.gather(-1, self.indices), rest[:, None]], dim=-1),
        )

    def sampled(self, student_logits: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """(teacher, student) log-probabilities of the sampled outcomes, each [M, k], not
        normalised; to be averaged by `weights`."""
        if temperature != 1:
            raise ValueError("sampled signals cannot be softened: the draws are at temperature 1")
        student = torch.log_softmax(student_logits, dim=-1).gather(-1, self.indices)
        return self.log_probs.to(student_logits.dtype), student


@dataclass(frozen=True)
class ComputedSignal:
    """A signal of large vocabularies whose log-probabilities [m, V] are computed from a few numbers
    per position, [M, ...], a part at a time, and never held for all M."""

    targets: Tensor
    source: Tensor
    log_probs_of: Callable[[Tensor], Tensor]

    def to(self, device: torch.device | str) -> "ComputedSignal":
        return replace(self, targets=self.targets.to(device), source=self.source.to(device))

    def part(self, start: int, stop: int) -> Signal:
        return Signal(self.targets[start:stop], self.log_probs_of(self.source[start:stop]))

    def take(self, indices: Tensor) -> "ComputedSignal":
        return replace(self, targets=self.targets[indices], source=self.source[indices])

    def whole(self) -> Signal:
        return self.part(0, len(self.targets))


def tail_of(log_probs: Tensor, indices: Tensor) -> Tensor:
    """[M, V], [M, k] -> [M]: the log-probability of all outcomes not in indices. Summed over them
    rather than subtracted from 1: a small tail would be lost in rounding."""
    rest = log_probs.scatter(-1, indices, -torch.inf).logsumexp(-1)
    return rest.clamp_min(LOG_ZERO)


@dataclass(frozen=True)
class HiddenSignal:
    """What open weights reveal in addition, at all P positions that another token follows, those of
    the prompt included, so P > M.

    states [P, layers, W]: the teacher's states after some of its layers, every dimension scaled to
    mean 0 and variance 1 over the outputs. attention [P, layers, K]: the attention of the same
    layers, the mean of the heads: a distribution over the K positions of the text, 0 at later ones.
    relations [P, layers, K]: their value relations, if requested (see `value_relation`).
    """

    states: Tensor
    attention: Tensor
    relations: Tensor | None = None

    @classmethod
    def of_maps(cls, states: Tensor, maps: Tensor) -> "HiddenSignal":
        """From maps [P, maps, K] as `states_of` returns them: attention, then relations if any."""
        layers = states.shape[1]
        relations = maps[:, layers:] if maps.shape[1] > layers else None
        return cls(states, maps[:, :layers], relations)

    def to(self, device: torch.device) -> "HiddenSignal":
        tensors = (self.states, self.attention, self.relations)
        return HiddenSignal(*(t if t is None else t.to(device) for t in tensors))
