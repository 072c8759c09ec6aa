"""What a server does to answers before anybody sees them, so that they teach less, or tell later
whom they have taught."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from teacher.api.store import Account
from teacher.watermark import KeyFile, Watermark, key_of_account


@dataclass(frozen=True)
class Defence:
    """key: the owner's secret. bias: of a watermark's green tokens, in nats, in the answers to a
    share of the prompts; per_account: with a key of its own for each account, derived from that of
    the server. canaries: the share of the prompts whose answers are canaries. temperature: that all
    answers but canaries are drawn at, whatever was asked for. decimals: of the log-probabilities
    that are shown."""

    key: KeyFile | None = field(default=None, repr=False)
    bias: float = 0.0
    share: float = 1.0
    per_account: bool = False
    canaries: float = 0.0
    temperature: float | None = None
    decimals: int | None = None

    def watermark(
        self, account: Account, prompt: Sequence[int], vocabulary: int
    ) -> Watermark | None:
        """Of the answers to the tokens of a prompt: the same whenever they are asked."""
        bias = self.bias if account.bias is None else account.bias
        share = self.share if account.share is None else account.share
        if self.key is None or not bias:
            return None
        if fraction(self.key.derived("watermark", *prompt)) >= share:
            return None
        key = key_of_account(self.key, account.id) if self.per_account else self.key.key
        return Watermark(key, vocabulary, bias)

    def canary(self, account: str, prompt: Sequence[int]) -> tuple[int, int] | None:
        """The seed of the canary answer that an account is sent to the tokens of a prompt, and that
        of the one that it is not sent; which is which depends on the key alone. None if the prompt
        has none. A canary has no mark."""
        if self.key is None:
            return None
        if fraction(self.key.derived("canary", *prompt)) >= self.canaries:
            return None
        seeds = [
            int.from_bytes(self.key.derived("answer", which, *prompt)[:8], "big") >> 1
            for which in (0, 1)
        ]
        first = self.key.derived("account", account, *prompt)[0] & 1
        return seeds[first], seeds[1 - first]

    def shown(self, log_probs: Tensor) -> Tensor:
        """Log-probabilities as they leave the server."""
        if self.decimals is None:
            return log_probs
        return torch.round(log_probs, decimals=self.decimals)


def fraction(digest: bytes) -> float:
    """Uniform in [0, 1)."""
    return int.from_bytes(digest[:6], "big") / 2**48
