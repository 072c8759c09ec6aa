"""Verdicts: which claims hold, by one rule for all models that is fixed beforehand."""

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from measure.statistics import RESAMPLES, Estimate, interval, ratio
from tasks.task import Metric


@dataclass(frozen=True)
class Comparison:
    """Two models in one metric, oriented so that a positive difference is better for the first.
    sign: 1 if higher is better, else -1."""

    claim: str
    metric: str
    sign: int
    threshold: float
    first: Estimate
    second: Estimate

    @property
    def equivalence(self) -> bool:
        return " matches " in self.claim

    @property
    def keeps(self) -> bool:
        return " keeps " in self.claim

    @cached_property
    def reference(self) -> Estimate:
        """What the first is compared with: the second, or the fraction of it to keep."""
        return self.second.times(self.threshold) if self.keeps else self.second

    @property
    def margin(self) -> float:
        return 0.0 if self.keeps else self.threshold

    @property
    def paired(self) -> bool:
        return len(self.first.per_seed) == len(self.second.per_seed) > 1

    @property
    def difference(self) -> float:
        return self.sign * (self.first.mean - self.reference.mean)

    @cached_property
    def by_seed(self) -> np.ndarray:
        """Differences seed by seed; one side may have a single seed, such as a second teacher."""
        return self.sign * (self.first.per_seed - self.reference.per_seed)

    @cached_property
    def resamples(self) -> np.ndarray:
        return self.sign * (self.first.resamples - self.reference.resamples)

    @property
    def p_value(self) -> float:
        """Two-sided, of the hypothesis that the difference equals the threshold.

        The resamples are as wide as the 95 % interval requires; the tails beyond it, which
        corrections for many claims need and 2,000 resamples do not reach, are those of Student's t.
        """
        freedom = max(len(self.first.per_seed), len(self.second.per_seed)) - 1
        tails = stats.t(freedom) if freedom else stats.norm()
        error = self.resamples.std() * stats.norm.ppf(0.975) / tails.ppf(0.975)
        distance = abs(self.difference - self.margin)
        return float(2 * tails.sf(distance / error)) if error > 0 else float(distance == 0)

    @property
    def p_equivalence(self) -> float:
        """Of two one-sided tests (TOST, Schuirmann 1987) that the difference exceeds the margin: a
        large p in a test for a difference is no evidence of equivalence."""
        beyond = [
            (self.resamples >= self.threshold).mean(),
            (self.resamples <= -self.threshold).mean(),
        ]
        return float(max(*beyond, 1 / RESAMPLES))

    def p_permutation(self) -> float | None:
        """Two-sided, of the hypothesis that the two models are exchangeable: differences flip their
        signs, seed by seed where both have several (n seeds cannot go below 2 / 2^n), else row by
        row; None where rows have no values to exchange, as for an ECE.
        """
        if self.paired:
            values = self.by_seed
        elif self.first.statistic is not ratio or self.second.statistic is not ratio:
            return None
        else:
            first, second = (
                (m.columns[:, :, 0] / np.maximum(m.columns[:, :, 1], 1e-12)).mean(axis=0)
                for m in (self.first, self.reference)
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
        """That a seed of the first beats a seed of the second, ties count half (Agarwal et al.
        2021, arXiv 2108.13264, section 4.3)."""
        first, second = self.sign * self.first.per_seed, self.sign * self.reference.per_seed
        wins = stats.mannwhitneyu(first, second, method="asymptotic").statistic
        return float(wins / (len(first) * len(second)))

    def seeds_needed(self, claims: int = 1) -> int | None:
        """How many seeds would show a difference of this size beyond the threshold with power 0.8,
        by the rule of `verdicts` for this number of claims; None where one seed cannot estimate it,
        or where no number suffices, as row variance common to all seeds does not average out.
        """
        if not self.paired:
            return None
        seeds, size = len(self.by_seed), abs(self.difference - self.margin)
        if self.equivalence:  # the nearer of the two margins is harder to show
            size = abs(self.threshold - abs(self.difference))
        values = self.sign * (self.first.over_rows - self.reference.over_rows)
        mean = values.mean(axis=1)
        # Row variance within each seed averages out over seeds; what all seeds share does not.
        within = (values - mean[:, None]).var(axis=0).mean() * seeds / (seeds - 1)
        common = max(0.0, mean.var() - within / seeds)
        between = self.by_seed.var(ddof=1)

        def power(n: int) -> float:
            deviation = math.sqrt(between + within + n * common)
            effect = size / max(deviation, 1e-12)
            return float(TTestPower().power(effect, n, alpha=0.05 / claims))

        counts = range(2, 10_000)
        place = bisect_left(counts, 0.8, key=power)
        return counts[place] if place < len(counts) else None


def verdicts(comparisons: list[Comparison]) -> list[dict]:
    """Decide all claims together.

    By the 95 % interval of the paired difference: entirely at or below the threshold is "does not
    beat"; entirely above is "beats" if still significant at 5 % after Holm's correction for the
    number of claims (Holm 1979); anything else is inconclusive. "A keeps a share of B" means that
    A beats that share of B. "A matches B" is an equivalence test: it holds if the difference lies
    within the margin at 5 %, and fails if all of the 95 % interval lies outside.
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


def verdict_line(verdict: dict, metrics: Mapping[str, Metric]) -> str:
    """`states beats baseline by 3.1 points of word errors [2.2, 4.0] over 5 seeds`; where that is
    not shown, `inconclusive: ...` or `not supported: states is 3.1 points of word errors worse
    than ...`."""
    claimed = verdict["result"] in ("beats", "keeps", "matches")
    undecided = verdict["result"] == "inconclusive"
    opening = "" if claimed else "inconclusive: " if undecided else "not supported: "
    more = f" ({what_would_decide(verdict)})" if undecided else ""
    return opening + comparison_in_words(verdict, metrics[verdict["metric"]], claimed) + more


def comparison_in_words(verdict: dict, metric: Metric, claimed: bool) -> str:
    """What was measured for a claim, in the claim's words if it holds."""
    first, verb, second = verdict["claim"].split()
    scale, digits, seeds = metric.scale, metric.digits, seeds_behind(verdict)
    threshold = scale * verdict["threshold"]
    numbers = (verdict["difference"], *verdict["ci95"])
    difference, low, high = (round(scale * number, digits) + 0.0 for number in numbers)  # no -0.0
    if verb == "keeps":
        low, high = (100 * bound for bound in verdict["share_ci95"])
        return (
            f"{first} keeps {100 * verdict['share']:.1f} % of the {metric.heading} of {second} "
            f"[{low:.1f}, {high:.1f}] {seeds}, {100 * verdict['threshold']:g} % needed"
        )
    of = f"{metric.difference_unit} of {metric.heading}"
    relation = f"{verb} {second} by" if verb == "beats" else f"{verb} {second} within"
    if claimed:
        text = f"{first} {relation} {difference:.{digits}f} {of}"
    else:
        worse = difference < 0
        if worse:
            difference, low, high = -difference, -high, -low
        text = (
            f"{first} is {difference:.{digits}f} {of} {'worse' if worse else 'better'} than "
            f"{second}"
        )
    needed = f", margin {threshold:g}" if verb == "matches" else f", more than {threshold:g} needed"
    needed = needed if verdict["threshold"] else ""
    return f"{text} [{low:.{digits}f}, {high:.{digits}f}] {seeds}{needed}"


def seeds_behind(verdict: dict) -> str:
    if verdict["seeds"] == 1:
        return "over 1 seed (the interval is over rows alone)"
    one_reference = verdict.get("against") == 1  # the interval excludes its spread over seeds
    return f"over {verdict['seeds']} seeds" + (" against one" if one_reference else "")


def what_would_decide(verdict: dict) -> str:
    """What an inconclusive claim of this size needs."""
    margin = 0.0 if " keeps " in verdict["claim"] else verdict["threshold"]
    beyond = " matches " not in verdict["claim"] and verdict["ci95"][0] > margin
    uncorrected = "significant alone, not after correction for all claims; " if beyond else ""
    return uncorrected + seeds_that_would_decide(verdict)


def seeds_that_would_decide(verdict: dict) -> str:
    """How many seeds a claim of this size needs, or what it needs instead."""
    needed = verdict["seeds_needed"]
    if needed is None and verdict["seeds"] > 1 == verdict.get("against"):
        return "more seeds of the reference are needed to estimate how many"
    if needed is None and verdict["seeds"] > 1:
        return "more held-out rows would decide it, more seeds would not"
    if needed is None:
        return "one seed cannot estimate how many are needed"
    return f"{needed} seeds would show a difference of this size in 80 % of cases"
