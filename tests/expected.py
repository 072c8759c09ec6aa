"""The objectives again, from their definitions, in NumPy and SciPy: an oracle for tests."""

import numpy as np
from scipy.special import log_softmax, rel_entr

from configs.schema import Recipe, value_at
from teacher.signal import Signal


def divergence(name: str, p: np.ndarray, q: np.ndarray, recipe: Recipe) -> np.ndarray:
    """Of two distributions [M, K], at T = 1: [M]. For the papers see student/objectives.py."""

    def kl(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return rel_entr(a, b).sum(-1)

    if name == "forward_kl":
        return kl(p, q)
    if name == "reverse_kl":
        return kl(q, p)
    if name == "generalised_jsd":
        middle = recipe.divergence.beta * p + (1 - recipe.divergence.beta) * q
        return recipe.divergence.beta * kl(p, middle) + (1 - recipe.divergence.beta) * kl(q, middle)
    if name == "skewed_forward_kl":
        return kl(p, recipe.divergence.skew * p + (1 - recipe.divergence.skew) * q)
    if name == "skewed_reverse_kl":
        return kl(q, recipe.divergence.skew * q + (1 - recipe.divergence.skew) * p)
    if name == "total_variation":
        return np.abs(p - q).sum(-1) / 2
    if name == "uld":
        width = max(p.shape[-1], q.shape[-1])
        a, b = (np.pad(np.sort(x)[:, ::-1], ((0, 0), (0, width - x.shape[-1]))) for x in (p, q))
        return np.abs(a - b).sum(-1)
    if name == "adaptive_kl":
        gap, shares = np.abs(p - q), []
        for chances, apart in zip(p, gap, strict=True):
            held, head = 0.0, []
            for outcome in np.argsort(-chances, kind="stable"):
                if held >= 0.5:
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
    nll = -np.take_along_axis(log_softmax(logits, -1), targets, -1)[:, 0]
    for name, weight in recipe.objective.items():
        first_order = name in ("total_variation", "uld")
        scale = (
            temperature ** (1 if first_order else 2)
            if recipe.divergence.temperature_squared
            else 1.0
        )
        if name == "cross_entropy":
            term = nll
        elif name == "policy_gradient":
            term = signal.advantages.double().numpy() * nll
        elif signal.weights is not None:
            drawn = np.take_along_axis(log_softmax(logits, -1), signal.indices.numpy(), -1)
            weights, revealed = signal.weights.double().numpy(), signal.log_probs.double().numpy()
            term = (weights * (revealed - drawn)).sum(-1)
        else:
            p, q = distributions(signal, logits, temperature)
            term = scale * divergence(name, p, q, recipe)
        total = total + value_at(weight, 0.0) * term
    return total
