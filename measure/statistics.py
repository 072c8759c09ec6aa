"""Estimates with intervals over seeds and rows.

An estimate is kept as columns [seeds, rows, C] and a function of the column sums [..., C] -> [...],
for instance wrong answers and answers, and their ratio.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from scipy import stats

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
    """[RESAMPLES, rows]: how often each row is drawn in each resample."""
    generator = np.random.Generator(np.random.PCG64(rows))
    drawn = generator.multinomial(rows, np.full(rows, 1 / rows), size=RESAMPLES)
    return drawn.astype(np.uint8)  # a row is never drawn 256 times


def widening(seeds: int) -> float:
    """The factor by which the bootstrap over a few seeds is too narrow: it divides by n, not n - 1,
    and its tails are normal, not Student's. Hesterberg 2015, arXiv 1411.5279, section 4."""
    if seeds == 1:
        return 1.0
    return math.sqrt(seeds / (seeds - 1)) * stats.t.ppf(0.975, seeds - 1) / stats.norm.ppf(0.975)


@dataclass(frozen=True, eq=False)
class Estimate:
    """columns [seeds, rows, C] and the statistic of their sums over rows."""

    columns: np.ndarray
    statistic: Callable[[np.ndarray], np.ndarray] = ratio

    @cached_property
    def per_seed(self) -> np.ndarray:
        return self.statistic(self.columns.sum(axis=1))

    @property
    def mean(self) -> float:
        return float(self.per_seed.mean())

    @cached_property
    def over_rows(self) -> np.ndarray:
        """[RESAMPLES, seeds] bootstrap values over rows only."""
        seeds, rows, _ = self.columns.shape
        values = np.empty((RESAMPLES, seeds))
        for draws in np.array_split(np.arange(RESAMPLES), 8):
            weights = row_weights(rows)[draws].astype(np.float64)
            for seed in range(seeds):
                values[draws, seed] = self.statistic(weights @ self.columns[seed])
        return values

    @cached_property
    def resamples(self) -> np.ndarray:
        """[RESAMPLES] bootstrap values of the mean: hierarchical, over seeds and over rows.

        Rows and seeds are crossed: all seeds share one draw of rows. The draws depend only on the
        numbers of rows and seeds, so differences of two estimates are paired by row, and by seed
        if both have equally many. The part due to seeds is widened for their small number.
        """
        seeds = len(self.per_seed)
        chosen = np.random.Generator(np.random.PCG64(seeds)).integers(
            seeds, size=(RESAMPLES, seeds)
        )
        over_rows = self.over_rows.mean(axis=1)
        over_both = np.take_along_axis(self.over_rows, chosen, axis=1).mean(axis=1)
        return over_rows + widening(seeds) * (over_both - over_rows)

    def times(self, share: float) -> "Estimate":
        """This ratio, multiplied by `share`."""
        return Estimate(self.columns * np.array([share, 1.0]))

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


def share_of_gap(sign: int, low: Estimate, student: Estimate, high: Estimate) -> dict:
    """The fraction of the gap from `low` to `high` that the student closes. sign: 1 if higher is
    better, else -1. None where the gap is not significantly above 0, so there is none to close.
    """
    gap = low.mean - high.mean
    gaps = low.resamples - high.resamples
    if -sign * gap <= 0 or (-sign * gaps <= 0).any():
        return {"share": None, "ci95": None, "gap": gap}
    resampled = (low.resamples - student.resamples) / gaps
    return {"share": (low.mean - student.mean) / gap, "ci95": interval(resampled), "gap": gap}
