"""Estimates over seeds and rows: standard errors, intervals and p-values.

All seeds of a model are evaluated on the same rows. The variance of a mean over n seeds is
therefore V/n + W: V, between seeds, averages out with more seeds; W, of the rows that all seeds
share, does not.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property

import numpy as np
from scipy import special
from scipy.optimize import brentq

from configs.schema import LabError

LEVEL = 0.05  # of every test; intervals cover 1 - LEVEL
POWER = 0.8
LEAST_GAP = 4.0  # standard errors; a ratio to a smaller gap has no useful interval
LEAST_P = 1e-30  # smaller p-values are given as this


def ratio(sums: np.ndarray) -> np.ndarray:
    """Columns (numerator, denominator)."""
    return sums[..., 0] / np.maximum(sums[..., 1], 1e-12)


def expected_calibration_error(sums: np.ndarray) -> np.ndarray:
    """Columns counts, confidences, hits, each [bins]. Guo et al. 2017, arXiv 1706.04599, eq. 3:
    the mean over positions of |confidence - accuracy| of their bin."""
    count, confidence, hits = np.split(sums, 3, axis=-1)
    return np.abs(confidence - hits).sum(-1) / np.maximum(count.sum(-1), 1e-12)


def calibrated_error(sums: np.ndarray) -> np.ndarray:
    """The ECE that a perfectly calibrated model with these confidences would have by chance: hits
    in a bin are then binomial, with mean absolute deviation sqrt(2/pi) times the standard one.
    Columns as for `expected_calibration_error`."""
    count, confidence, _ = np.split(sums, 3, axis=-1)
    chance = np.clip(confidence / np.maximum(count, 1e-12), 0, 1)
    deviation = np.sqrt(2 / np.pi * np.maximum(count, 0) * chance * (1 - chance))
    return deviation.sum(-1) / np.maximum(count.sum(-1), 1e-12)


@dataclass(frozen=True, eq=False)
class Estimate:
    """A statistic of each seed [n], and how it depends on each row [n, R].

    influence: the first-order effect of a row on its seed's value; a row's sums over seeds are of
    mean 0 and their sum of squares is the variance (infinitesimal jackknife, Efron and Tibshirani
    1993, section 22.3).
    """

    per_seed: np.ndarray
    influence: np.ndarray
    is_one_model: bool = False  # by nature, such as a teacher: paired with every seed of another

    @classmethod
    def of(
        cls, columns: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray] = ratio
    ) -> "Estimate":
        """columns [n, R, C]; the statistic maps sums over rows [..., C] to values [...]."""
        if columns.shape[1] < 2:
            raise LabError("one row has no interval; evaluate on more rows")
        sums = columns.sum(axis=1)
        step = 1e-6 * np.maximum(np.abs(sums).max(axis=1), 1e-6)[:, None]
        nudges = step[:, None] * np.eye(sums.shape[1])  # [n, C, C]
        around = statistic(sums[:, None] + nudges) - statistic(sums[:, None] - nudges)
        centred = columns - columns.mean(axis=1, keepdims=True)
        return cls(statistic(sums), np.einsum("nrc,nc->nr", centred, around / (2 * step)))

    @property
    def seeds(self) -> int:
        return len(self.per_seed)

    @property
    def mean(self) -> float:
        return float(self.per_seed.mean())

    def __sub__(self, other: "Estimate") -> "Estimate":
        """The paired difference, by seed and by row; see `paired`."""
        first, second = paired(self, other)
        return Estimate(first.per_seed - second.per_seed, first.influence - second.influence)

    def __mul__(self, factor: float) -> "Estimate":
        return replace(self, per_seed=factor * self.per_seed, influence=factor * self.influence)

    def __truediv__(self, other: "Estimate") -> "Estimate":
        """The ratio of the means, to first order in the deviations of both (delta method)."""
        first, second = paired(self, other)
        found = first.mean / second.mean
        change = first - second * found
        return Estimate(found + change.per_seed / second.mean, change.influence / second.mean)

    @cached_property
    def variances(self) -> tuple[float, float]:
        """(V, W): between seeds, per seed; and of the rows that all seeds share.

        The squared influences of the mean contain W and, once per seed, what rows do to that seed
        alone; the latter is part of V, and is subtracted from W. If all seeds are equal (a few more
        right answers in each), V says nothing, and nothing is subtracted.
        """
        seeds, rows = self.influence.shape
        common = self.influence.mean(axis=0)
        scale = rows / max(rows - 1, 1)
        over_rows = scale * float((common**2).sum())
        if seeds == 1:
            return 0.0, over_rows
        between = float(self.per_seed.var(ddof=1))
        if between <= 1e-24:
            return 0.0, over_rows
        single = scale * float(((self.influence - common) ** 2).sum()) / (seeds - 1)
        return between, max(0.0, over_rows - single / seeds)

    def standard_error(self, seeds: int | None = None) -> float:
        """Of the mean over these seeds, or over another number of them."""
        between, rows = self.variances
        return math.sqrt(between / (seeds or self.seeds) + rows)

    def weighted(self, quantile: Callable[[float], float], seeds: int | None = None) -> float:
        """A quantile, given for the degrees of freedom of seeds and of rows, weighted by their
        variances (Cochran and Cox 1957, section 4.14). Satterthwaite's degrees of freedom covered
        less than 95 % for few seeds."""
        seeds = seeds or self.seeds
        between, rows = self.variances
        of_rows = quantile(max(self.influence.shape[1] - 1, 1))
        if seeds == 1 or between == 0:
            return float(of_rows)
        total = between / seeds + rows
        return float((between / seeds * quantile(seeds - 1) + rows * of_rows) / total)

    def critical(self, level: float, seeds: int | None = None) -> float:
        """How many standard errors a difference must exceed at this two-sided level."""
        return self.weighted(lambda freedom: -special.stdtrit(freedom, level / 2), seeds)

    @property
    def interval(self) -> list[float]:
        """The 95 % interval of the mean."""
        half = self.critical(LEVEL) * self.standard_error()
        return [self.mean - half, self.mean + half]

    def p_value(self, value: float = 0.0) -> float:
        """Two-sided, of the hypothesis that the mean is `value`: the level whose interval would
        just reach it."""
        distance, error = abs(self.mean - value), self.standard_error()
        if error <= 1e-12 * max(abs(self.mean), abs(value), 1e-12):  # all rows and seeds agree
            return float(distance <= 1e-12)
        if self.critical(LEAST_P) < distance / error:
            return LEAST_P
        exponent = brentq(
            lambda e: self.critical(math.exp(e)) - distance / error, math.log(LEAST_P), 0.0
        )
        return math.exp(exponent)

    def detectable(self, level: float) -> float:
        """The difference that these seeds would find with power 0.8."""
        return self.needed(level, self.seeds)

    def needed(self, level: float, seeds: int) -> float:
        """The difference that this number of seeds would find with power 0.8."""

        def noncentrality(freedom: float) -> float:
            critical = -special.stdtrit(freedom, level / 2)
            return float(special.nctdtrinc(freedom, 1 - POWER, critical))

        return self.weighted(noncentrality, seeds) * self.standard_error(seeds)

    def seeds_needed(self, distance: float, level: float) -> int | None:
        """How many seeds would find a difference of this size with power 0.8; None where no number
        does, or where one seed cannot tell."""
        most = 10_000
        if self.seeds == 1 or distance == 0 or self.needed(level, most) > distance:
            return None
        low, high = 1, most
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.needed(level, middle) <= distance else (middle, high)
        return high

    def summary(self) -> dict:
        """{"mean", "ci95", "per_seed"}"""
        return {"mean": self.mean, "ci95": self.interval, "per_seed": self.per_seed.tolist()}


def joint_draws(estimates: list[Estimate], count: int) -> np.ndarray:
    """[count, len(estimates)]: means that other seeds and other rows could have given, drawn from a
    normal distribution. Models share rows, and the seeds that both have."""
    common = np.stack([estimate.influence.mean(axis=0) for estimate in estimates])
    covariance = common @ common.T
    for (i, a), (j, b) in itertools.product(enumerate(estimates), repeat=2):
        shared = min(a.seeds, b.seeds)
        if i == j:
            covariance[i, i] = a.standard_error() ** 2
        elif shared > 1:
            between = np.cov(a.per_seed[:shared], b.per_seed[:shared])[0, 1]
            covariance[i, j] += between * shared / (a.seeds * b.seeds)
    variances, directions = np.linalg.eigh(covariance)
    scales = directions * np.sqrt(np.maximum(variances, 0.0))
    normal = np.random.Generator(np.random.PCG64(0)).standard_normal((count, len(estimates)))
    return np.array([estimate.mean for estimate in estimates]) + normal @ scales.T


def paired(first: Estimate, second: Estimate) -> tuple[Estimate, Estimate]:
    """Both with the seeds that both have, in their order; one model by nature is repeated."""
    seeds = min((one.seeds for one in (first, second) if not one.is_one_model), default=1)

    def aligned(one: Estimate) -> Estimate:
        if one.is_one_model:
            return Estimate(np.repeat(one.per_seed, seeds), np.repeat(one.influence, seeds, axis=0))
        return Estimate(one.per_seed[:seeds], one.influence[:seeds])

    return aligned(first), aligned(second)


def share_of_gap(sign: int, low: Estimate, student: Estimate, high: Estimate) -> dict:
    """The fraction of the gap from `low` to `high` that the student closes. sign: 1 if higher is
    better, else -1. None unless the gap is 4 standard errors above 0: there is none to close, or
    the fraction could be anything.
    """
    gap = low - high
    if -sign * gap.mean <= LEAST_GAP * gap.standard_error():
        return {"share": None, "ci95": None, "gap": gap.mean}
    share = (low - student) / gap
    return {"share": share.mean, "ci95": share.interval, "gap": gap.mean}


def corrected_for(p: float, comparisons: int, correlation: float = 0.5) -> float:
    """The p-value of one of several comparisons with one reference, corrected for all of them:
    the chance that the largest of equally correlated deviations is as large (Dunnett 1955).

    Differences from one reference have correlation 1/2 where all models vary alike; with 0 it is
    the correction of Sidak 1967, for comparisons that share no reference. Other degrees of freedom
    than those of a normal distribution are in p already.
    """
    if comparisons == 1:
        return p
    nodes, weights = np.polynomial.hermite_e.hermegauss(128)
    z, shared, own = -special.ndtri(p / 2), math.sqrt(correlation), math.sqrt(1 - correlation)
    tails = special.ndtr((shared * nodes - z) / own) + special.ndtr((-shared * nodes - z) / own)
    largest = -np.expm1(comparisons * np.log1p(-np.minimum(tails, 1 - 1e-16)))
    return float(np.clip(weights @ largest / weights.sum(), p, 1.0))


@cache
def level_of_one(comparisons: int, correlation: float = 0.5) -> float:
    """The level of one comparison that is LEVEL for all of them."""
    if comparisons == 1:
        return LEVEL

    def above(p: float) -> float:
        return corrected_for(p, comparisons, correlation) - LEVEL

    return float(brentq(above, 1e-12, LEVEL))
