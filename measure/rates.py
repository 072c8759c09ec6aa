"""Claims of a study that counts: rates with intervals, and what they decide."""

from dataclasses import dataclass
from typing import Any

from scipy.stats import beta

SUPPORTED, REFUTED, UNDECIDED = "supported", "refuted", "not decided"


@dataclass(frozen=True)
class Rate:
    """found of total, with an interval (Clopper and Pearson 1934)."""

    found: int
    total: int

    def __add__(self, other: "Rate") -> "Rate":
        return Rate(self.found + other.found, self.total + other.total)

    @property
    def share(self) -> float:
        return self.found / self.total if self.total else 0.0

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        low, high = (1 - level) / 2, (1 + level) / 2
        k, n = self.found, self.total
        return (
            float(beta.ppf(low, k, n - k + 1)) if k else 0.0,
            float(beta.ppf(high, k + 1, n - k)) if k < n else 1.0,
        )

    def summary(self) -> dict[str, Any]:
        return {"found": self.found, "of": self.total, "ci95": [*self.interval()]}

    def __str__(self) -> str:
        low, high = self.interval()
        return f"{self.share:.1%} ({low:.1%}-{high:.1%})"


def claim(statement: str, supported: bool, refuted: bool) -> dict[str, Any]:
    result = SUPPORTED if supported else REFUTED if refuted else UNDECIDED
    return {"claim": statement, "result": result}


def at_least(statement: str, rate: Rate, least: float) -> dict[str, Any]:
    """Supported if the whole interval of the rate is at least this, refuted if all is below."""
    low, high = rate.interval()
    return claim(statement, low >= least, high < least)


def at_most(statement: str, rate: Rate, most: float) -> dict[str, Any]:
    """Supported if the whole interval of the rate is at most this, refuted if all is above."""
    low, high = rate.interval()
    return claim(statement, high <= most, low > most)


def between(statement: str, value: float, low: float, high: float) -> dict[str, Any]:
    """Of a value without an interval."""
    inside = low <= value <= high
    return claim(statement, inside, not inside)
