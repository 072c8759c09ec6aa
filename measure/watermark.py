"""Whether a text, or a student that wrote it, carries a watermark.

The test is valid for any text, because only the key is random: it asks whether the text has more
green tokens with this key than with others. What the owner's own model would have written without
the mark is subtracted first, which removes what the text has in common with every good model.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import norm
from torch import Tensor

from teacher.watermark import SHARE, green, random_key

KEYS = 400  # other keys that a text is compared with


@dataclass(frozen=True)
class Found:
    """z: standard deviations above what other keys give. p: the share of keys with at least this
    z, itself counted among them; p_normal: by the normal distribution, for smaller values."""

    tokens: int
    z: float
    p: float
    p_normal: float


class Evidence:
    """surplus [V, V]: after each token, how often each other token came, less how often the owner's
    unmarked model expects it there."""

    def __init__(self, vocabulary: int) -> None:
        self.surplus = torch.zeros((vocabulary, vocabulary), dtype=torch.float64)
        self.tokens = 0

    def add(self, last: Tensor, token: Tensor, expected: Tensor | None = None) -> None:
        """Tokens [N] and those before [N]; expected [N, V]: the owner's probabilities there, None
        for a text of which they are not known. After token 0 nothing is green."""
        counts = last > 0
        last, token = last[counts], token[counts]
        self.surplus.index_put_((last, token), torch.ones(len(last)).double(), accumulate=True)
        if expected is not None:
            self.surplus.index_add_(0, last, -expected[counts].double())
        self.tokens += len(last)

    def z(self, key: int) -> float:
        """The sum over green tokens, standardised: with a key that the text does not know, a
        token's list is a random share of the vocabulary, drawn without replacement."""
        vocabulary = len(self.surplus)
        share = int(SHARE * vocabulary) / vocabulary
        centred = self.surplus - self.surplus.mean(1, keepdim=True)
        variance = share * (1 - share) * vocabulary / (vocabulary - 1) * centred.square().sum()
        if variance == 0:
            return 0.0
        return float((centred * green(key, vocabulary)).sum() / variance.sqrt())

    def test(self, key: int, others: Iterable[int]) -> Found:
        z = self.z(key)
        zs = np.array([self.z(other) for other in others])
        p = float((1 + (zs >= z).sum()) / (1 + len(zs)))
        return Found(self.tokens, z, p, float(norm.sf(z)))


def other_keys(count: int = KEYS) -> list[int]:
    return [random_key() for _ in range(count)]
