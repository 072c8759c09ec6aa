"""Statistics of paired runs: intervals over seeds and rows, and verdicts fixed beforehand.

A metric is kept as columns [seeds, rows, C] and a function of the column sums [..., C] -> [...],
for instance wrong answers and answers, and their ratio.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

RESAMPLES = 2000


def ratio(sums: np.ndarray) -> np.ndarray:
    """Columns (numerator, denominator)."""
    return sums[..., 0] / np.maximum(sums[..., 1], 1e-12)


def expected_calibration_error(sums: np.ndarray) -> np.ndarray:
    """Columns counts, confidences, hits, each [bins]. Guo et al. 2017, arXiv 1706.04599, eq. 3:
    the mean over positions of |confidence - accuracy| of their bin."""
    count, confidence, hits = np.split(sums, 3, axis=-1)
    return np.abs(confidence - hits).sum(-1) / np.maximum(count.sum(-1), 1e-12)


@lru_cache(maxsize=4)
def row_weights(rows: int) -> np.ndarray:
    """[RESAMPLES, rows]: how often each row is drawn in each resample of that many rows."""
    generator = np.random.Generator(np.random.PCG64(rows))
    drawn = generator.multinomial(rows, np.full(rows, 1 / rows), size=RESAMPLES)
    return drawn.astype(np.uint8)  # a row is never drawn 256 times


@dataclass(frozen=True, eq=False)
class Metric:
    """columns [seeds, rows, C] and the statistic of their sums over rows."""

    columns: np.ndarray
    statistic: Callable[[np.ndarray], np.ndarray] = ratio

    @property
    def per_seed(self) -> np.ndarray:
        return self.statistic(self.columns.sum(axis=1))

    @property
    def mean(self) -> float:
        return float(self.per_seed.mean())

    @cached_property
    def resamples(self) -> np.ndarray:
        """[RESAMPLES] bootstrap values of the mean, over seeds and over rows.

        Rows and seeds are crossed: one draw of rows serves all seeds. The draws depend on the
        number of rows and of seeds alone, so differences of two metrics are paired by row, and by
        seed where both have as many.
        """
        seeds, rows, _ = self.columns.shape
        values = np.empty((RESAMPLES, seeds))
        for draws in np.array_split(np.arange(RESAMPLES), 8):
            weights = row_weights(rows)[draws].astype(np.float64)
            for seed in range(seeds):
                values[draws, seed] = self.statistic(weights @ self.columns[seed])
        chosen = np.random.Generator(np.random.PCG64(seeds)).integers(
            seeds, size=(RESAMPLES, seeds)
        )
        return np.take_along_axis(values, chosen, axis=1).mean(axis=1)

    def summary(self) -> dict:
        """{"mean", "ci95", "per_seed"}"""
        return {
            "mean": self.mean,
            "ci95": interval(self.resamples),
            "per_seed": self.per_seed.tolist(),
        }


def interval(resamples: np.ndarray) -> list[float]:
    """The 95 % percentile interval."""
    return [float(bound) for bound in np.percentile(resamples, [2.5, 97.5])]


def share_of_gap(low: Metric, student: Metric, high: Metric) -> dict:
    """How much of the way from `low` to `high` the student went: 0 none, 1 all; null where there
    is no gap to close."""
    gap = low.mean - high.mean
    gaps = low.resamples - high.resamples
    if gap == 0 or (gaps == 0).any():
        return {"share": None, "ci95": None, "gap": gap}
    resampled = (low.resamples - student.resamples) / gaps
    return {"share": (low.mean - student.mean) / gap, "ci95": interval(resampled), "gap": gap}


LOWER_IS_BETTER = ("word_error_rate", "phoneme_error_rate", "kl_", "nll_gap", "ece")


def verdict(claim: str, metric: str, threshold: float, first: Metric, second: Metric) -> dict:
    """Does `first` beat `second` by more than the threshold? From the 95 % interval of the paired
    difference, oriented so that positive is better: all of it above the threshold beats, all of it
    at or below does not, anything else is inconclusive."""
    sign = -1 if metric.startswith(LOWER_IS_BETTER) else 1
    difference = sign * (first.mean - second.mean)
    low, high = interval(sign * (first.resamples - second.resamples))
    seeds = len(first.per_seed)
    result = (
        "beats" if low > threshold else "does not beat" if high <= threshold else "inconclusive"
    )
    return {
        "claim": claim,
        "metric": metric,
        "result": result,
        "difference": difference,
        "ci95": [low, high],
        "threshold": threshold,
        "seeds": seeds,
    }


def verdict_line(verdict: dict) -> str:
    """`distilled beats alone by 3.1 points of sequence agreement [2.2, 4.0] over 5 seeds: BEATS`"""
    scale, unit = (
        (1, "nats of")
        if "kl_" in verdict["metric"] or "nll" in verdict["metric"]
        else (
            100,
            "points of",
        )
    )
    low, high = (scale * bound for bound in verdict["ci95"])
    seeds = (
        f"over {verdict['seeds']} seeds"
        if verdict["seeds"] > 1
        else "over 1 seed (the interval is over rows alone)"
    )
    beyond = f", more than {scale * verdict['threshold']:g} needed" if verdict["threshold"] else ""
    digits = 1 if scale == 100 else 3
    return (
        f"{verdict['claim']} by {scale * verdict['difference']:.{digits}f} {unit} "
        f"{verdict['metric'].replace('_', ' ')} [{low:.{digits}f}, {high:.{digits}f}] {seeds}"
        f"{beyond}: {verdict['result'].upper()}"
    )
