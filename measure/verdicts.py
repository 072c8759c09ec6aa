"""Verdicts: what a run shows of each claim, by one rule for all models that is fixed beforehand."""

from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from measure.statistics import Estimate, corrected_for, level_of_one
from tasks.task import Metric

NOT_DISTINGUISHED, ONE_RUN = "not distinguished", "one run"
UNSUPPORTED = ("too little", "does not keep", "does not match")


@dataclass(frozen=True)
class Comparison:
    """Two models in one metric, oriented so that a positive difference is better for the first.
    sign: 1 if higher is better, else -1. threshold: see configs/schema.py."""

    claim: str
    metric: str
    sign: int
    threshold: float
    first: Estimate
    second: Estimate
    split: str = "heldout"
    exploratory: bool = False

    @property
    def verb(self) -> str:
        return self.claim.split()[1]

    @cached_property
    def difference(self) -> Estimate:
        """From the second; where a share of it is to be kept, from that share."""
        share = self.threshold if self.verb == "keeps" else 1.0
        return (self.first - self.second * share) * self.sign

    @property
    def margin(self) -> float:
        return 0.0 if self.verb == "keeps" else self.threshold

    @cached_property
    def p_value(self) -> float:
        """Two-sided, of the hypothesis that the difference is the margin. For a match, of the two
        hypotheses that it is the margin or more in either direction (TOST, Schuirmann 1987): a
        large p in a test for a difference is no evidence of equality."""
        if self.verb != "matches":
            return self.difference.p_value(self.margin)
        return max(
            one_sided(self.difference * -1, -self.margin), one_sided(self.difference, -self.margin)
        )


def one_sided(difference: Estimate, value: float) -> float:
    """The p-value of the hypothesis that the difference is `value` or less."""
    half = difference.p_value(value) / 2
    return half if difference.mean > value else 1 - half


def families(comparisons: list[Comparison]) -> list[Hashable]:
    """The family of each claim: one question, asked of several models about one, whichever of the
    two names comes first."""
    questions = [(one.verb, one.metric, one.split) for one in comparisons]
    names = [(one.claim.split()[0], one.claim.split()[2]) for one in comparisons]
    uses = Counter(
        (question, name)
        for question, both in zip(questions, names, strict=True)
        for name in {*both}
    )
    return [
        (question, max(sorted(both), key=lambda name, question=question: uses[question, name]))
        for question, both in zip(questions, names, strict=True)
    ]


def verdicts(comparisons: list[Comparison], together: bool = False) -> list[dict]:
    """Decide all claims; those of a family are corrected for their number (Dunnett 1955).
    together: all are one family, without a common model (Sidak 1967).

    `A beats B` is decided to be better, worse or, where a difference beyond the threshold was
    claimed, too little; `A keeps a share of B` and `A matches B within a margin` hold or do not
    hold. A claim that is not decided at 5 % is not distinguished. One seed decides nothing: its
    result is `one run`, and `here` is what holds for these rows and these two models.
    """
    found = [0] * len(comparisons) if together else families(comparisons)
    sizes, correlation = Counter(found), 0.0 if together else 0.5
    return [
        verdict(one, sizes[family], correlation)
        for one, family in zip(comparisons, found, strict=True)
    ]


def verdict(one: Comparison, comparisons: int, correlation: float = 0.5) -> dict[str, Any]:
    difference, level = one.difference, level_of_one(comparisons, correlation)
    decided = decide(one, level)
    result = decided if difference.seeds > 1 else ONE_RUN
    distance = abs(difference.mean - one.margin)
    if one.verb == "matches":  # the nearer margin is harder to show
        distance = abs(one.margin - abs(difference.mean))
    kept = {}
    if one.verb == "keeps":
        share = one.first / one.second if one.second.mean else None
        kept = {
            "share": share.mean if share else None,
            "share_ci95": share.interval if share else None,
        }
    needed = difference.seeds_needed(distance, level) if result == NOT_DISTINGUISHED else None
    return {
        "claim": one.claim,
        "metric": one.metric,
        "split": one.split,
        "threshold": one.threshold,
        "exploratory": one.exploratory,
        "result": result,
        "here": decided if result == ONE_RUN else None,
        "difference": difference.mean,
        "ci95": difference.interval,
        "per_seed": difference.per_seed.tolist(),
        **kept,
        "seeds": difference.seeds,
        "against_one_model": one.first.is_one_model or one.second.is_one_model,
        "comparisons": comparisons,
        "p_value": one.p_value,
        "p_corrected": corrected_for(one.p_value, comparisons, correlation),
        "detectable": difference.detectable(level),
        "seeds_needed": needed,
    }


def decide(one: Comparison, level: float) -> str:
    """The result at this level of a single comparison."""

    def significant(p: float) -> bool:
        return p <= level

    difference, above = one.difference, one.difference.mean > one.margin
    if one.verb == "keeps" and not one.second.mean:
        return NOT_DISTINGUISHED
    if one.verb == "matches":
        outside = significant(difference.p_value(one.margin if above else -one.margin))
        if significant(one.p_value):
            return "matches"
        beyond = outside and abs(difference.mean) > one.margin
        return "does not match" if beyond else NOT_DISTINGUISHED
    if not significant(one.p_value):
        return NOT_DISTINGUISHED
    if one.verb == "keeps":
        return "keeps" if above else "does not keep"
    if above:
        return "better"
    worse = difference.mean < 0 and significant(difference.p_value())
    return "worse" if worse else "too little"


def claim_of(verdict: dict[str, Any]) -> str:
    """`states beats baseline: sequence_agreement`, with a threshold if it has one, and the split if
    it is not the main one."""
    split = "" if verdict["split"] == "heldout" else f" ({verdict['split']})"
    threshold = f" by {verdict['threshold']:g}" if verdict["threshold"] else ""
    return f"{verdict['claim']}{threshold}: {verdict['metric']}{split}"


def verdict_line(verdict: dict, metrics: Mapping[str, Metric], items: str = "rows") -> str:
    """`hidden is 3.1 points of word errors better than baseline [2.2, 4.0] over 5 seeds`. What is
    not distinguished, exploratory or of one run begins by saying so. items: what the rows are."""
    result, found = verdict["result"], Comparing(verdict, metrics[verdict["metric"]])
    opening = "exploratory: " if verdict["exploratory"] else ""
    if result == ONE_RUN:
        said = f"in this run: {found.words()} on these {items} {found.interval()}{found.others()}"
        return opening + said
    said = f"{found.words()} {found.interval()} {found.seeds()}{found.needed()}"
    if result == NOT_DISTINGUISHED:
        return f"{opening}not distinguished: {said} ({found.would_decide()})"
    return f"{opening}{result}: {said}" if result in UNSUPPORTED else opening + said


@dataclass(frozen=True)
class Comparing:
    """The parts of a sentence about a verdict."""

    verdict: dict
    metric: Metric

    @property
    def names(self) -> list[str]:
        return self.verdict["claim"].split()

    def number(self, value: float, signed: bool = False) -> str:
        digits = self.metric.digits
        value = round(self.metric.scale * value, digits) + 0.0  # no -0.0
        return f"{value:{'+' if signed else ''}.{digits}f}"

    @property
    def of(self) -> str:
        return f"{self.metric.difference_unit} of {self.metric.heading}"

    @property
    def is_worse(self) -> bool:
        return self.verdict["difference"] < 0

    def words(self) -> str:
        first, verb, second = self.names
        if verb == "keeps":
            share = self.verdict["share"]
            if share is None:
                return f"{second} has no {self.metric.heading} to keep"
            return f"{first} keeps {100 * share:.1f} % of the {self.metric.heading} of {second}"
        size = self.number(abs(self.verdict["difference"]))
        if self.verdict["result"] == "matches":
            return f"{first} matches {second} within {size} {self.of}"
        return f"{first} is {size} {self.of} {'worse' if self.is_worse else 'better'} than {second}"

    def interval(self) -> str:
        if self.names[1] == "keeps" and self.verdict["share_ci95"]:
            return "[{:.1f}, {:.1f}]".format(*(100 * b for b in self.verdict["share_ci95"]))
        low, high = self.verdict["ci95"]
        if self.is_worse:  # as the sentence has it: by how much it is worse
            low, high = -high, -low
        return f"[{self.number(low)}, {self.number(high)}]"

    def seeds(self) -> str:
        one_model = self.verdict["against_one_model"]  # whose spread the interval does not cover
        return f"over {self.verdict['seeds']} seeds" + (" against one model" if one_model else "")

    def needed(self) -> str:
        """The threshold, where there is one."""
        verb, threshold = self.names[1], self.metric.scale * self.verdict["threshold"]
        if verb == "keeps":
            return f", {100 * self.verdict['threshold']:g} % needed"
        if verb == "matches":
            return f", margin {threshold:g}"
        return f", more than {threshold:g} claimed" if threshold else ""

    def would_decide(self) -> str:
        """How many seeds a difference of this size needs, or what it needs instead."""
        needed = self.verdict["seeds_needed"]
        if needed is None:
            return "more rows would decide it, more seeds would not"
        return f"{needed} seeds would show a difference of this size in 80 % of cases"

    def others(self) -> str:
        """How the committed runs of the same config compare, if there are some."""
        committed = self.verdict.get("committed")
        if not committed:
            return "; one seed shows no more"
        spread = self.number(committed["spread"])
        here = self.number(self.verdict["difference"], signed=True)
        mean = self.number(committed["mean"], signed=True)
        return (
            f" ({here} here; {mean} ± {spread} over {committed['runs']} committed runs, better in "
            f"{committed['ahead']} of them)"
        )
