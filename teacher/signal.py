"""What a teacher revealed at some positions of a text: all that an objective ever sees of it."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

NEVER = -69.0  # nats: less likely than 1e-30 is taken as this


@dataclass(frozen=True)
class Signal:
    """M positions of text and what the teacher revealed there.

    targets [M]: the tokens that stand in the text (all that access `text` reveals).
    log_probs [M, V] for access `logits`, [M, k] for `top_k` and `sampled`, None for `text`; nats,
    temperature 1.
    indices [M, k]: the token ids of the k log-probabilities, None otherwise.
    tail [M] for `top_k`: the log-probability of all the rest together.
    weights [M, k] for `sampled`: the share of the draws that each of the ids got; 0 fills up.
    advantages [M]: no teacher but a reward: by how much an answer that the student wrote was
    better than its others to the same prompt, at each of its tokens.

    A signal read from disk and one computed a moment ago are the same type.
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

    def to(self, device: torch.device) -> "Signal":
        return Signal(*(t if t is None else t.to(device) for t in self.tensors))

    def part(self, start: int, stop: int) -> "Signal":
        """That of some of the positions."""
        return Signal(*(t if t is None else t[start:stop] for t in self.tensors))

    @staticmethod
    def joined(parts: "Sequence[Signal]") -> "Signal":
        """Signals one after the other."""
        columns = zip(*(part.tensors for part in parts), strict=True)
        return Signal(*(None if column[0] is None else torch.cat(column) for column in columns))

    def outcomes(self, student_logits: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """(teacher, student) log-probabilities over the same outcomes, each [M, K], normalised.

        Full log-probabilities: K = V, both softened by the temperature. Top-k: K = k + 1, where
        the last outcome is everything else. A divergence over these k + 1 outcomes is a true one:
        never negative, and never above the divergence over all V (data-processing inequality).
        """
        if self.log_probs is None:
            raise ValueError("this signal is text alone: it has no distribution to compare with")
        if self.weights is not None:
            raise ValueError("of a sampled signal forward_kl alone can be estimated")
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
            torch.log_softmax(teacher, dim=-1),  # what was stored is rounded
            torch.cat([student.gather(-1, self.indices), rest[:, None]], dim=-1),
        )

    def drawn(self, student_logits: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """(teacher, student) log-probabilities of the outcomes that were drawn, each [M, k]; not
        normalised. For access `sampled`, to be averaged by `weights`."""
        if temperature != 1:
            raise ValueError("sampled signals cannot be softened: they were drawn at temperature 1")
        student = torch.log_softmax(student_logits, dim=-1).gather(-1, self.indices)
        return self.log_probs.to(student_logits.dtype), student


def reveal(
    access: str, k: int, targets: Tensor, log_probs: Tensor, generator: torch.Generator
) -> Signal:
    """What a teacher that thinks log_probs [M, V] reveals of them, live; see shards.py for what is
    kept on disk. Access `sampled` draws k times from its distribution."""
    if access == "top_k":
        top = log_probs.topk(k, dim=-1)
        tail = tail_of(log_probs, top.indices)
        return Signal(targets, top.values, top.indices, tail=tail)
    if access == "sampled":
        drawn = torch.multinomial(log_probs.exp(), k, replacement=True, generator=generator)
        weights = torch.full(drawn.shape, 1 / k, dtype=log_probs.dtype)
        return Signal(targets, log_probs.gather(-1, drawn), drawn, weights)
    return Signal(targets, log_probs)


def tail_of(log_probs: Tensor, indices: Tensor) -> Tensor:
    """[M, V], [M, k] -> [M]: the log-probability of all outcomes but these. Summed over them, not
    subtracted from 1: a small rest would be lost in the rounding."""
    rest = log_probs.scatter(-1, indices, -torch.inf).logsumexp(-1)
    return rest.clamp_min(NEVER)


@dataclass(frozen=True)
class Inside:
    """What access `hidden` reveals besides, at all P positions of a text that another token
    follows; those of the prompt too, so P > M.

    hidden [P, layers, W]: the teacher's states after some of its layers, every dimension with mean
    0 and variance 1 over the outputs.
    attention [P, layers, K]: where it looked from there, in the same layers, the mean of its
    heads: a distribution over the K positions of the text, 0 to the right. Where the relations of
    its values are revealed too, they follow: [P, 2 layers, K], see `relation_of`.
    """

    hidden: Tensor
    attention: Tensor

    def to(self, device: torch.device) -> "Inside":
        return Inside(self.hidden.to(device), self.attention.to(device))


def shows_states(layers: Sequence[int], relations: bool = False) -> dict[str, bool]:
    """The options of a forward pass that `states_of` reads."""
    cache = {"use_cache": True} if relations else {}
    return {"output_hidden_states": bool(layers), "output_attentions": bool(layers), **cache}


def states_of(output: Any, layers: Sequence[int], relations: bool = False) -> tuple[Tensor, Tensor]:
    """(states [B, L, layers, W], attention [B, L, layers, K]) from a forward pass that was asked
    for them by `shows_states`. Layers count from 1. With `relations` those of the values follow the
    attention: [B, L, 2 layers, K]."""
    hidden = torch.stack([output.hidden_states[layer] for layer in layers], dim=2)
    maps = [output.attentions[layer - 1].mean(1) for layer in layers]
    if relations:
        cache, new = output.past_key_values, hidden.shape[1]
        maps += [relation_of(cache.layers[layer - 1].values, new) for layer in layers]
    return hidden, torch.stack(maps, dim=2)


def relation_of(values: Tensor, new: int) -> Tensor:
    """How alike the values of the last `new` positions are to those up to them, values [B, heads,
    K, D] -> [B, new, K]: softmax(V V^T / sqrt(D)), the mean over heads. Wang et al. 2020 (MiniLM),
    arXiv 2002.10957, equation 7, but to the left alone, as a causal model is asked token by token.
    """
    alike = values[:, :, -new:] @ values.transpose(-1, -2) / values.shape[-1] ** 0.5
    there = values.shape[2]
    later = torch.ones(new, there, dtype=torch.bool, device=values.device).triu(there - new + 1)
    return alike.masked_fill(later, -torch.inf).softmax(-1).mean(1)
