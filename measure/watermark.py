"""Whether a text, or a student that wrote it, carries a watermark.

The test is valid for any text, because only the key is random: it asks whether the text has more
green tokens with this key than with others. The counts that the owner's unmarked model expects are
subtracted first, which removes what the text shares with every good model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import norm
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutput

from models.language import Forward, device_of
from teacher.watermark import SHARE, green, random_key

KEYS = 400  # other keys that a text is compared with
RARE = 2.0  # counts that are added to both, so that rare pairs are not subtracted


@dataclass(frozen=True)
class WatermarkTest:
    """z: standard deviations above what a random key gives. p_rank: the share of keys with at least
    this z, the tested one counted among them; p_normal: the tail of the normal distribution, for
    values that the number of keys cannot resolve."""

    tokens: int
    z: float
    p_rank: float
    p_normal: float


class Evidence:
    """surplus [V, V]: after each token, how often each other token came, minus how often the
    owner's unmarked model expects it there."""

    def __init__(self, vocabulary: int) -> None:
        self.surplus = torch.zeros((vocabulary, vocabulary), dtype=torch.float64)
        self.tokens = 0

    def add(self, last: Tensor, token: Tensor, expected: Tensor | None = None) -> None:
        """Tokens [N] and those before [N]; expected [N, V]: the owner's probabilities there, None
        for a text of which they are unknown. After token 0 no token is green."""
        counts = last > 0
        last, token = last[counts], token[counts]
        self.surplus.index_put_((last, token), torch.ones(len(last)).double(), accumulate=True)
        if expected is not None:
            self.surplus.index_add_(0, last, -expected[counts].double())
        self.tokens += len(last)

    def z(self, key: int) -> float:
        """The sum over green tokens, standardised: with a random key, the green list after a token
        is a random share of the vocabulary, drawn without replacement."""
        vocabulary = len(self.surplus)
        share = int(SHARE * vocabulary) / vocabulary
        centred = self.surplus - self.surplus.mean(1, keepdim=True)
        variance = share * (1 - share) * vocabulary / (vocabulary - 1) * centred.square().sum()
        if variance == 0:
            return 0.0
        return float((centred * green(key, vocabulary)).sum() / variance.sqrt())


def watermark_tests(
    texts: Mapping[str, Evidence], key: int, others: Sequence[int]
) -> dict[str, WatermarkTest]:
    """One test per text, all against the same other keys."""
    tested = {name: one.z(key) for name, one in texts.items()}
    nulls = np.array([[one.z(other) for one in texts.values()] for other in others])
    found = {}
    for column, (name, z) in enumerate(tested.items()):
        rank = float((1 + (nulls[:, column] >= z).sum()) / (1 + len(others)))
        found[name] = WatermarkTest(texts[name].tokens, z, rank, float(norm.sf(z)))
    return found


def other_keys(count: int = KEYS) -> list[int]:
    return [random_key() for _ in range(count)]


# -- how it is removed -----------------------------------------------------------------------------


def stolen_bias(counted: Tensor, expected: Tensor) -> Tensor:
    """[V, V] by how many nats each token seems to be raised after each other one, from how often
    marked answers have it there and how often an innocent model would: what an extractor can know
    of the lists without the key (Jovanović et al. 2024, arXiv 2402.19361). Rare pairs say
    little."""
    return ((counted + RARE) / (expected + RARE)).log().float()


class WithoutBias:
    """A model whose owner subtracts a bias [V, V] by the token before."""

    def __init__(self, model: Forward, bias: Tensor) -> None:
        self.model, self.bias = model, bias

    @property
    def device(self) -> torch.device:
        return device_of(self.model)

    def __call__(self, input_ids: Tensor, **options: Any) -> CausalLMOutput:
        logits = self.model(input_ids, **options).logits[..., : len(self.bias)]
        return CausalLMOutput(logits=logits - self.bias[input_ids[:, -logits.shape[1] :]])
