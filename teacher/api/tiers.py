"""The table TIERS: what an account may see and ask, and what it pays.

`access` names a level of the table ACCESS: what a tier reveals is what a recipe with that access
learns from.
"""

from dataclasses import dataclass, replace

from configs.schema import LabError

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
        from teacher.access import ACCESS  # imports torch, which managing accounts does not need

        return ACCESS[self.access].sold(self.k, vocabulary)

    def cost(self, prompt_tokens: int, completion_tokens: int) -> int:
        """In millionths of a millionth of the currency: a whole number, so that bills add up."""
        return (
            round(self.price_in * PER_MILLION) * prompt_tokens
            + round(self.price_out * PER_MILLION) * completion_tokens
        )


TIERS: dict[str, Tier] = {
    "text": Tier("text", 0.10, 0.40),
    "top5": Tier("top_k", 0.10, 0.50, k=5, logit_bias=True),
    "top20": Tier("top_k", 0.10, 0.60, k=20, logit_bias=True),
    "open": Tier("logits", 0.10, 1.00, logit_bias=True),
}
UNLIMITED = {"requests_per_minute": None, "tokens_per_minute": None, "tokens_per_day": None}
# The same for customers with a contract: at these prices, without limits.
TIERS |= {f"{name}-bulk": replace(tier, **UNLIMITED) for name, tier in TIERS.items()}

# For the owner's own measurements.
TIERS["internal"] = Tier("logits", 0.0, 0.0, logit_bias=True, **UNLIMITED)


def tier_for(access: str, k: int | None) -> str:
    """The cheapest tier without limits that reveals what a recipe with this access asks for.
    LabError if none does."""
    enough = [
        name
        for name, tier in TIERS.items()
        if name.endswith("-bulk") and tier.access == access and tier.k >= (k or 0)
    ]
    if not enough:
        most = max(tier.k for tier in TIERS.values())
        raise LabError(
            f"no tier reveals what access {access} learns from with k {k}: the largest k is {most}"
        )
    return min(enough, key=lambda name: TIERS[name].price_out)
