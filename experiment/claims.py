"""Rules for the claims of a config: models, metrics and splits that exist, thresholds that fit."""

from collections.abc import Iterator

from configs.schema import CONTROLS, Config, Verdict, nearest
from measure.metrics import metrics_of
from tasks.task import Metric, Task


def check_claims(config: Config, task: type[Task]) -> Iterator[str]:
    """All claims that the evaluation tests."""
    metrics = metrics_of(task)
    names = {*config.recipes, *config.controls}
    for claim in config.claims():
        yield from check_claim(claim, task)
    for name in config.compare.against if config.compare else []:
        if name not in names:
            yield f"compare.against: no student or control {name!r}{nearest(name, names)}"
    for verdict in config.verdicts:
        for name in verdict.names:
            if name not in names | {"teacher"}:
                advice = nearest(name, names | {"teacher"})
                if name in CONTROLS:
                    advice = f"; add {name} to controls, or remove the verdict"
                yield f"verdict {verdict.claim!r}: no student or control {name!r}{advice}"
        yield from check_threshold(verdict, metrics[verdict.metric])
    stated = [(v.claim, v.metric, v.split, v.threshold) for v in config.verdicts]
    for claim, metric, *_ in {one for one in stated if stated.count(one) > 1}:
        yield f"verdict {claim!r} of {metric} is there twice; remove one"


def check_claim(claim: Verdict, task: type[Task]) -> Iterator[str]:
    """The metric and the split exist."""
    metrics = metrics_of(task)
    if claim.metric not in metrics:
        yield (
            f"verdict {claim.claim!r}: task {task.name} has no metric {claim.metric!r}"
            f"{nearest(claim.metric, metrics)}; there are {', '.join(metrics)}"
        )
        return
    if claim.split not in task.evaluation_splits:
        splits = ", ".join(task.evaluation_splits)
        yield (
            f"verdict {claim.claim!r}: task {task.name} has no split {claim.split}; there are "
            f"{splits}"
        )
        return
    wanted, there = metrics[claim.metric].steps, task.steps.get(claim.split, ())
    if not {*wanted} <= {*there}:
        yield (
            f"verdict {claim.claim!r}: split {claim.split} has problems of {min(there)} to "
            f"{max(there)} steps, none for {claim.metric}"
        )


def check_threshold(verdict: Verdict, metric: Metric) -> Iterator[str]:
    """The threshold has the metric's unit and suits the claim."""
    threshold = verdict.threshold
    if " keeps " in verdict.claim and not 0 < threshold < 1:
        yield (
            f"verdict {verdict.claim!r}: threshold {threshold:g}, expected the fraction to keep, "
            "above 0 and below 1"
        )
    if " beats " in verdict.claim and threshold < 0:
        yield (
            f"verdict {verdict.claim!r}: threshold {threshold:g}: a worse model beats nothing; "
            "use matches or keeps"
        )
    if abs(threshold) >= 1 and metric.is_share:
        yield (
            f"verdict {verdict.claim!r}: threshold {threshold:g} of {verdict.metric}, a fraction; "
            f"did you mean {threshold / 100:g}?"
        )
    if " keeps " in verdict.claim and metric.lower_is_better:
        yield (
            f"verdict {verdict.claim!r}: lower is better for {verdict.metric}, so `keeps` does not "
            "apply; use matches or beats"
        )
    if " matches " in verdict.claim and threshold <= 0:
        yield (
            f"verdict {verdict.claim!r} needs a threshold above 0: two models are never equal, "
            "only within a margin"
        )
