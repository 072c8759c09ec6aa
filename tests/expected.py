"""What the loss of an untrained student must be, from the definitions alone: NumPy and SciPy, one
row at a time, with nothing of what training uses. A self-check compares the log with it.
"""

import numpy as np
import torch
from scipy.special import log_softmax, rel_entr
from torch import nn

from configs.schema import INSIDE, Recipe, value_at
from student.hidden import FLOOR
from student.lessons import Lessons
from tasks.rows import collate
from teacher.signal import Signal


def divergence(name: str, p: np.ndarray, q: np.ndarray, recipe: Recipe) -> np.ndarray:
    """Of two distributions [M, K], at T = 1: [M]. The papers stand in student/objectives.py."""

    def kl(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return rel_entr(a, b).sum(-1)

    if name == "forward_kl":
        return kl(p, q)
    if name == "reverse_kl":
        return kl(q, p)
    if name == "generalised_jsd":
        middle = recipe.beta * p + (1 - recipe.beta) * q
        return recipe.beta * kl(p, middle) + (1 - recipe.beta) * kl(q, middle)
    if name == "skewed_forward_kl":
        return kl(p, recipe.skew * p + (1 - recipe.skew) * q)
    if name == "skewed_reverse_kl":
        return kl(q, recipe.skew * q + (1 - recipe.skew) * p)
    if name == "total_variation":
        return np.abs(p - q).sum(-1) / 2
    if name == "sorted_distance":
        width = max(p.shape[-1], q.shape[-1])
        a, b = (np.pad(np.sort(x)[:, ::-1], ((0, 0), (0, width - x.shape[-1]))) for x in (p, q))
        return np.abs(a - b).sum(-1)
    if name == "adaptive_kl":
        gap, shares = np.abs(p - q), []
        for chances, apart in zip(p, gap, strict=True):
            held, head = 0.0, []
            for outcome in np.argsort(-chances, kind="stable"):
                if held >= recipe.head:
                    break
                head.append(outcome)
                held += chances[outcome]
            shares.append(apart[head].sum() / apart.sum() if apart.sum() else 0.5)
        share = np.array(shares)
        return share * kl(p, q) + (1 - share) * kl(q, p)
    raise KeyError(name)


def distributions(
    signal: Signal, logits: np.ndarray, temperature: float
) -> tuple[np.ndarray, np.ndarray]:
    """(teacher, student) over the same outcomes, softened."""
    revealed = signal.log_probs.double().numpy()
    q = np.exp(log_softmax(logits / temperature, -1))
    if signal.indices is None:
        return np.exp(log_softmax(revealed / temperature, -1)), q
    p = np.exp(np.concatenate([revealed, signal.tail.double().numpy()[:, None]], -1))
    top = np.take_along_axis(q, signal.indices.numpy(), -1)
    others = q.copy()
    np.put_along_axis(others, signal.indices.numpy(), 0.0, -1)
    return p / p.sum(-1, keepdims=True), np.concatenate([top, others.sum(-1, keepdims=True)], -1)


def losses(recipe: Recipe, logits: np.ndarray, signal: Signal) -> np.ndarray:
    """Of M positions at the first step: logits [M, V] -> [M] nats."""
    temperature, total = value_at(recipe.temperature, 0.0), np.zeros(len(logits))
    targets = signal.targets.numpy()[:, None]
    said = -np.take_along_axis(log_softmax(logits, -1), targets, -1)[:, 0]
    for name, weight in recipe.objective.items():
        first_order = name in ("total_variation", "sorted_distance")
        scale = temperature ** (1 if first_order else 2) if recipe.temperature_squared else 1.0
        if name == "cross_entropy":
            term = said
        elif name == "policy_gradient":
            term = signal.advantages.double().numpy() * said
        elif name in INSIDE:
            continue
        elif signal.weights is not None:
            drawn = np.take_along_axis(log_softmax(logits, -1), signal.indices.numpy(), -1)
            weights, revealed = signal.weights.double().numpy(), signal.log_probs.double().numpy()
            term = (weights * (revealed - drawn)).sum(-1)
        else:
            p, q = distributions(signal, logits, temperature)
            term = scale * divergence(name, p, q, recipe)
        total = total + value_at(weight, 0.0) * term
    return total


@torch.no_grad()
def first_loss(
    recipe: Recipe,
    model: nn.Module,
    lessons: Lessons,
    indices: np.ndarray,
    vocabulary: int,
    prompt_weight: float,
) -> float:
    """The loss of the first step over some rows. Rows of one length go through the model together,
    so that nothing is padded; which logits answer for which token is counted out here."""
    rows, total, weights, inside, positions = lessons.rows, 0.0, 0.0, 0.0, 0
    inner = {name: value_at(recipe.objective.get(name, 0.0), 0.0) for name in INSIDE}
    lengths = rows.lengths_of(indices)
    for length in np.unique(lengths):
        part = indices[lengths == length]
        tokens = np.stack([rows.row(i) for i in part]).astype(np.int64)
        shown = model(torch.from_numpy(tokens), use_cache=False)
        logits = shown.logits[..., :vocabulary].double().numpy()
        first = [int(rows.prompt_lengths[i]) for i in part]  # the first token of the completion
        begin = [1 if prompt_weight else start for start in first]
        batch = collate(rows, part, 0, prompt_weight)
        signal = lessons.signal(batch)
        targets = np.concatenate([row[b:] for row, b in zip(tokens, begin, strict=True)])
        if not np.array_equal(targets, signal.targets.numpy()):
            return float("nan")  # what is supervised is not what follows
        answering = np.concatenate([logits[j, b - 1 : -1] for j, b in enumerate(begin)])
        counts = np.concatenate(
            [
                np.where(np.arange(b, length) < start, prompt_weight, 1.0)
                for b, start in zip(begin, first, strict=True)
            ]
        )
        total += float((counts * losses(recipe, answering, signal)).sum())
        weights += float(counts.sum())
        if any(inner.values()):
            teacher = lessons.inside(batch)
            apart = shown.projected[:, :-1].flatten(0, 1).double() - teacher.hidden.double()
            looks = shown.attention[:, :-1].flatten(0, 1).double().numpy() + FLOOR
            there = teacher.attention.double().numpy()
            missed = (there * np.log((there + FLOOR) / looks)).sum(-1)  # [P, maps]
            layers = teacher.hidden.shape[1]
            looked, related = missed[:, :layers].mean(-1).sum(), missed[:, layers:].sum() / layers
            inside += inner["hidden_match"] * float((apart**2).mean((1, 2)).sum())
            inside += inner["attention_match"] * float(looked)
            inside += inner["relation_match"] * float(related)
            positions += len(part) * (int(length) - 1)
    return total / weights + (inside / positions if positions else 0.0)
