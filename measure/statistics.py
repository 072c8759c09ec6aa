"""Statistics of paired runs: intervals over seeds and rows, and verdicts fixed beforehand.

A metric is kept as columns [seeds, rows, C] and a function of the column sums [..., C] -> [...],
for instance wrong answers and answers, and their ratio.
"""

import math
import re
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from configs.schema import LOWER_IS_BETTER

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


def widening(seeds: int) -> float:
    """By how much the bootstrap over a few seeds is too narrow: it divides by n, not n - 1, and
    its tails are normal, not Student's. Hesterberg 2015, arXiv 1411.5279, section 4."""
    if seeds == 1:
        return 1.0
    return math.sqrt(seeds / (seeds - 1)) * stats.t.ppf(0.975, seeds - 1) / stats.norm.ppf(0.975)


@dataclass(frozen=True, eq=False)
class Metric:
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
        """[RESAMPLES, seeds] bootstrap values over rows alone."""
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

        Rows and seeds are crossed: one draw of rows serves all seeds. The draws depend on the
        number of rows and of seeds alone, so differences of two metrics are paired by row, and by
        seed where both have as many. What the draw of seeds adds is widened for their small number.
        """
        seeds = len(self.per_seed)
        chosen = np.random.Generator(np.random.PCG64(seeds)).integers(
            seeds, size=(RESAMPLES, seeds)
        )
        over_rows = self.over_rows.mean(axis=1)
        over_both = np.take_along_axis(self.over_rows, chosen, axis=1).mean(axis=1)
        return over_rows + widening(seeds) * (over_both - over_rows)

    def times(self, share: float) -> "Metric":
        """A share of a ratio."""
        return Metric(self.columns * np.array([share, 1.0]))

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


def share_of_gap(metric: str, low: Metric, student: Metric, high: Metric) -> dict:
    """How much of the way from `low` to `high` the student went: 0 none, 1 all; null where there
    is no gap to close, as `high` is not better beyond doubt."""
    sign = 1 if metric.startswith(LOWER_IS_BETTER) else -1
    gap = low.mean - high.mean
    gaps = low.resamples - high.resamples
    if sign * gap <= 0 or (sign * gaps <= 0).any():
        return {"share": None, "ci95": None, "gap": gap}
    resampled = (low.resamples - student.resamples) / gaps
    return {"share": (low.mean - student.mean) / gap, "ci95": interval(resampled), "gap": gap}


@dataclass(frozen=True)
class Comparison:
    """Two arms in one metric, oriented so that a positive difference is better for the first."""

    claim: str
    metric: str
    threshold: float
    first: Metric
    second: Metric

    @property
    def sign(self) -> int:
        return -1 if self.metric.startswith(LOWER_IS_BETTER) else 1

    @property
    def equivalence(self) -> bool:
        return " matches " in self.claim

    @property
    def keeps(self) -> bool:
        return " keeps " in self.claim

    @cached_property
    def bar(self) -> Metric:
        """What the first is held against: the second, or the share of it that is to be kept."""
        return self.second.times(self.threshold) if self.keeps else self.second

    @property
    def margin(self) -> float:
        return 0.0 if self.keeps else self.threshold

    @property
    def paired(self) -> bool:
        return len(self.first.per_seed) == len(self.second.per_seed) > 1

    @property
    def difference(self) -> float:
        return self.sign * (self.first.mean - self.bar.mean)

    @cached_property
    def by_seed(self) -> np.ndarray:
        """Differences seed by seed; one arm may have a single seed, as the twin has."""
        return self.sign * (self.first.per_seed - self.bar.per_seed)

    @cached_property
    def resamples(self) -> np.ndarray:
        return self.sign * (self.first.resamples - self.bar.resamples)

    @property
    def p_value(self) -> float:
        """Two-sided, that the difference is the threshold: by how many standard errors it is off.

        The resamples are as wide as a 95 % interval of so many seeds must be; Student's t gives
        the tails beyond, which many comparisons need and 2,000 resamples do not reach.
        """
        freedom = max(len(self.first.per_seed), len(self.second.per_seed)) - 1
        tails = stats.t(freedom) if freedom else stats.norm()
        error = self.resamples.std() * stats.norm.ppf(0.975) / tails.ppf(0.975)
        off = abs(self.difference - self.margin)
        return float(2 * tails.sf(off / error)) if error > 0 else float(off == 0)

    @property
    def p_equivalence(self) -> float:
        """Of two one-sided tests (TOST, Schuirmann 1987) that the difference is beyond the margin:
        a large p of a test for a difference would prove nothing."""
        beyond = [
            (self.resamples >= self.threshold).mean(),
            (self.resamples <= -self.threshold).mean(),
        ]
        return float(max(*beyond, 1 / RESAMPLES))

    def p_permutation(self) -> float | None:
        """Two-sided, that the two arms are exchangeable: differences flip their signs, seed by
        seed where both have several (2 / 2^n is the least that n seeds can show), else row by row;
        None where rows have no values to exchange, as in an ECE.
        """
        if self.paired:
            values = self.by_seed
        elif self.first.statistic is not ratio or self.second.statistic is not ratio:
            return None
        else:
            first, second = (
                (m.columns[:, :, 0] / np.maximum(m.columns[:, :, 1], 1e-12)).mean(axis=0)
                for m in (self.first, self.bar)
            )
            values = first - second
        if not np.any(values):
            return 1.0
        found = stats.permutation_test(
            (values,), np.mean, permutation_type="samples", n_resamples=2 * RESAMPLES,
            vectorized=True, batch=100, rng=np.random.Generator(np.random.PCG64(0)),
        )  # fmt: skip
        return float(found.pvalue)

    def effect_size(self) -> float | None:
        """Cohen's d of the paired differences: their mean over their deviation between seeds."""
        deviation = self.by_seed.std(ddof=1) if self.paired else 0.0
        return float(self.by_seed.mean() / deviation) if deviation > 0 else None

    def probability_of_improvement(self) -> float:
        """That a seed of the first beats a seed of the second, ties by halves (Agarwal et al.
        2021, arXiv 2108.13264, section 4.3)."""
        first, second = self.sign * self.first.per_seed, self.sign * self.bar.per_seed
        wins = stats.mannwhitneyu(first, second, method="asymptotic").statistic
        return float(wins / (len(first) * len(second)))

    def seeds_needed(self, claims: int = 1) -> int | None:
        """How many seeds show a difference of this size beyond the threshold with power 0.8, by the
        rule of `verdicts` for so many claims; None where one seed cannot tell, or where no number
        would, as what differs from row to row in all seeds alike does not average out.
        """
        if not self.paired:
            return None
        seeds, size = len(self.by_seed), abs(self.difference - self.margin)
        if self.equivalence:  # of the two margins, the nearer one is harder to show
            size = abs(self.threshold - abs(self.difference))
        values = self.sign * (self.first.over_rows - self.bar.over_rows)
        mean = values.mean(axis=1)
        # Rows vary in each seed by itself (and average out over seeds), and in all seeds alike.
        own = (values - mean[:, None]).var(axis=0).mean() * seeds / (seeds - 1)
        common = max(0.0, mean.var() - own / seeds)
        between = self.by_seed.var(ddof=1)

        def power(n: int) -> float:
            deviation = math.sqrt(between + own + n * common)
            effect = size / max(deviation, 1e-12)
            return float(TTestPower().power(effect, n, alpha=0.05 / claims))

        counts = range(2, 10_000)
        place = bisect_left(counts, 0.8, key=power)
        return counts[place] if place < len(counts) else None


def verdicts(comparisons: list[Comparison]) -> list[dict]:
    """Which claims hold, by a rule that looks at no name.

    From the 95 % interval of the paired difference: all of it at or below the threshold does not
    beat; all of it above beats, if it is still significant at 5 % after Holm's correction for the
    number of claims (Holm 1979); anything else is inconclusive. A claim that an arm keeps a share
    of another is that it beats that share of it. A claim that two arms match is an
    equivalence test: it holds if the difference lies within the margin at 5 %, fails if all of the
    95 % interval lies outside.
    """
    if not comparisons:
        return []
    values = [c.p_equivalence if c.equivalence else c.p_value for c in comparisons]
    _, corrected, _, _ = multipletests(values, method="holm")
    claims = len(comparisons)
    return [verdict(c, float(p), claims) for c, p in zip(comparisons, corrected, strict=True)]


def verdict(comparison: Comparison, p_holm: float, claims: int) -> dict:
    low, high = interval(comparison.resamples)
    margin, significant = comparison.margin, p_holm <= 0.05
    if comparison.equivalence:
        outside = low > margin or high < -margin
        result = "matches" if significant else "does not match" if outside else "inconclusive"
    else:
        beats = low > margin and significant
        verb = "keep" if comparison.keeps else "beat"
        result = f"{verb}s" if beats else f"does not {verb}" if high <= margin else "inconclusive"
    kept = {}
    if comparison.keeps:
        first, second = comparison.first, comparison.second
        shares = first.resamples / np.maximum(second.resamples, 1e-12)
        kept = {"share": first.mean / max(second.mean, 1e-12), "share_ci95": interval(shares)}
    return {
        "claim": comparison.claim,
        "metric": comparison.metric,
        "result": result,
        "difference": comparison.difference,
        "ci95": [low, high],
        **kept,
        "threshold": comparison.threshold,
        "seeds": len(comparison.first.per_seed),
        "against": len(comparison.second.per_seed),
        "p_permutation": comparison.p_permutation(),
        "p_holm": p_holm,
        "effect_size": comparison.effect_size(),
        "probability_of_improvement": comparison.probability_of_improvement(),
        "seeds_needed": comparison.seeds_needed(claims) if result == "inconclusive" else None,
    }


def verdict_line(verdict: dict) -> str:
    """`distilled beats alone by 3.1 points of sequence agreement [2.2, 4.0] over 5 seeds: BEATS`"""
    nats = verdict["metric"].startswith(("kl_", "nll"))
    scale, digits, unit = (1, 3, "nats of") if nats else (100, 1, "points of")
    low, high = (scale * bound for bound in verdict["ci95"])
    seeds = (
        f"over {verdict['seeds']} seeds"
        if verdict["seeds"] > 1
        else "over 1 seed (the interval is over rows alone)"
    )
    if verdict["seeds"] > 1 == verdict.get("against"):
        seeds += " against one"  # whose own luck the interval does not know
    more = f" ({what_would_tell(verdict)})" if verdict["result"] == "inconclusive" else ""
    if " keeps " in verdict["claim"]:
        low, high = (100 * bound for bound in verdict["share_ci95"])
        first, _, second = verdict["claim"].split()
        return (
            f"{first} keeps {100 * verdict['share']:.1f} % of the {in_words(verdict['metric'])} of "
            f"{second} [{low:.1f}, {high:.1f}] {seeds}, {100 * verdict['threshold']:g} % needed: "
            f"{verdict['result'].upper()}{more}"
        )
    by, beyond = "by", ""
    if " matches " in verdict["claim"]:
        by, beyond = "to", f", margin {scale * verdict['threshold']:g}"
    elif verdict["threshold"]:
        beyond = f", more than {scale * verdict['threshold']:g} needed"
    return (
        f"{verdict['claim']} {by} {scale * verdict['difference']:.{digits}f} {unit} "
        f"{in_words(verdict['metric'])} [{low:.{digits}f}, {high:.{digits}f}] {seeds}"
        f"{beyond}: {verdict['result'].upper()}{more}"
    )


def in_words(metric: str) -> str:
    """`accuracy_4_5` -> `accuracy at 4 and 5 steps`"""
    name = re.sub(r"^accuracy_(\d)_(\d)$", r"accuracy at \1 and \2 steps", metric)
    return re.sub(r"^accuracy_(\d)$", r"accuracy at \1 steps", name).replace("_", " ")


def what_would_tell(verdict: dict) -> str:
    """How an inconclusive claim of this size could be decided, and if it would be sure alone."""
    margin = 0.0 if " keeps " in verdict["claim"] else verdict["threshold"]
    beyond = " matches " not in verdict["claim"] and verdict["ci95"][0] > margin
    alone = "taken alone it would hold, among all claims it may be chance; " if beyond else ""
    return alone + seeds_that_would_tell(verdict)


def seeds_that_would_tell(verdict: dict) -> str:
    """How many seeds a claim of this size needs, or what it needs instead."""
    needed = verdict["seeds_needed"]
    if needed is None and verdict["seeds"] > 1 == verdict.get("against"):
        return "more seeds of the other would say how many are needed"
    if needed is None and verdict["seeds"] > 1:
        return "more held-out rows would tell, more seeds would not"
    if needed is None:
        return "more seeds would say how many are needed"
    return f"{needed} seeds would tell a difference of this size in 80 % of cases"
