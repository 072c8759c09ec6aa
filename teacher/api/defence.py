"""What a server does to answers before anybody sees them, so that they teach less, or tell later
whom they have taught."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from teacher.api.store import Account
from teacher.watermark import Watermark, key_of_account


@dataclass(frozen=True)
class Defence:
    """bias: of a watermark's green tokens, in nats; with a key, the server's, or one of its own for
    each account, derived from it. decimals: of the log-probabilities that are shown."""

    key: int | None = field(default=None, repr=False)
    bias: float = 0.0
    per_account: bool = False
    decimals: int | None = None

    def watermark(self, account: Account, vocabulary: int) -> Watermark | None:
        bias = self.bias if account.bias is None else account.bias
        if self.key is None or not bias:
            return None
        key = key_of_account(self.key, account.id) if self.per_account else self.key
        return Watermark(key, vocabulary, bias)

    def shown(self, log_probs: Tensor) -> Tensor:
        """Log-probabilities as they leave the server."""
        if self.decimals is None:
            return log_probs
        return torch.round(log_probs, decimals=self.decimals)
