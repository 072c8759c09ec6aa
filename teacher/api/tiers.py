"""The table TIERS: what an account may see and ask, and what it pays.

`access` names a level of the table ACCESS: what a tier reveals is what a recipe with that access
learns from.
"""

from dataclasses import dataclass

PER_MILLION = 1_000_000  # tokens, for which prices are stated


@dataclass(frozen=True)
class Tier:
    """k: log-probabilities per token at most, with access top_k. price_in, price_out: money per
    million tokens of prompts and of answers. Limits: None is unlimited."""

    access: str
    price_in: float
    price_out: float
    k: int = 0
    logit_bias: bool = False
    requests_per_minute: int | None = 60
    tokens_per_minute: int | None = 20_000
    tokens_per_day: int | None = 200_000

    def most_alternatives(self, vocabulary: int) -> int:
        """How many log-probabilities of other tokens it reveals at each token."""
        return {"text": 0, "top_k": min(self.k, vocabulary), "logits": vocabulary}[self.access]

    def cost(self, prompt_tokens: int, completion_tokens: int) -> int:
        """In millionths of a millionth of the currency: a whole number, so that bills add up."""
        return (
            round(self.price_in * PER_MILLION) * prompt_tokens
            + round(self.price_out * PER_MILLION) * completion_tokens
        )


TIERS = {
    "text": Tier("text", 0.10, 0.40),
    "top5": Tier("top_k", 0.10, 0.50, k=5, logit_bias=True),
    "top20": Tier("top_k", 0.10, 0.60, k=20, logit_bias=True),
    "open": Tier("logits", 0.10, 1.00, logit_bias=True),
    # For the owner's own measurements.
    "internal": Tier(
        "logits", 0.0, 0.0, logit_bias=True, requests_per_minute=None, tokens_per_minute=None,
        tokens_per_day=None,
    ),
}  # fmt: skip
