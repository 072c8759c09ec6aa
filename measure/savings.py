"""Savings: which fraction of another's cost a student needs for the same quality.

The cost is that of training, against students of the data; or, where outputs were bought, tokens
and money, against students that were shown less.

Students that differ only in their budget are a curve of quality against cost. For the quality of
each student of the reference curve, the cost at which another curve reaches it is interpolated
between two neighbouring budgets, linearly in the logarithm of the cost. Nothing is extrapolated.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from measure.laws import without_keys
from measure.statistics import LEAST_GAP, Estimate

# What may differ between the students of a curve: the budget, and what was tuned for it.
VARIED = (
    "student.budget_fraction",
    "student.learning_rate",
    "student.seeds",
    "outputs.transfer_rows",
)
COSTS = ("flops", "seconds", "money")
# What may differ between students that bought more or fewer answers of one kind.
VARIED_BOUGHT = ("student.learning_rate", "student.seeds", "outputs.transfer_rows")
PAID = ("tokens", "money")

Curve = dict[str, float]  # {student: its budget}, from the smallest


def curves_in(
    result: dict[str, Any], varied: tuple[str, ...], size: Callable[[str], float | None]
) -> dict[str, Curve]:
    """{name: curve} of students that differ in nothing but `varied`, with three or more different
    sizes; those without a size are left out. `text_2` belongs to `text`."""
    groups: dict[str, Curve] = {}
    for name, entry in result["students"].items():
        kind = json.dumps(without_keys(entry["recipe"], varied), sort_keys=True)
        if size(name) is not None:
            groups.setdefault(kind, {})[name] = size(name)
    found = {}
    for group in groups.values():
        if len(set(group.values())) == len(group) >= 3:
            kind = re.sub(r"[_-]?\d+$", "", next(iter(group)))
            found[kind] = dict(sorted(group.items(), key=lambda item: item[1]))
    return found


def savings(
    result: dict[str, Any], estimates: Mapping[str, Mapping[str, Estimate]], signs: dict[str, int]
) -> dict[str, Any] | None:
    """estimates: {student: {metric: estimate}}. signs: {metric: 1 if higher is better, else -1} of
    the metrics to compare in. None unless there are curves with and without a teacher.

    {"reference", "curves", "labels" and "answers" read by student, "needs": {metric:
    {student of the reference: {curve: {cost: {"ratio", "ci95"}} or why there is none}}}}.
    """

    def budget(name: str) -> float:
        return result["students"][name]["recipe"]["student"]["budget_fraction"]

    curves = curves_in(result, VARIED, budget)
    students, costs = result["students"], result["cost"]["fraction_of_teacher_by_student"]
    recipes = {name: students[next(iter(curve))]["recipe"] for name, curve in curves.items()}
    reference = next((name for name, recipe in recipes.items() if reads_data(recipe)), None)
    known = all(costs[name]["flops"] for curve in curves.values() for name in curve)
    if reference is None or len(curves) < 2 or not known:
        return None
    needs = needs_of(curves, reference, costs, COSTS, estimates, signs)
    return {"reference": reference, "curves": curves, "needs": needs, **rows_read(result, curves)}


def bought(
    result: dict[str, Any], estimates: Mapping[str, Mapping[str, Estimate]], signs: dict[str, int]
) -> dict[str, Any] | None:
    """What students paid whose outputs were bought, and what each kind of access needs for the same
    quality as the first. None unless there are curves of several kinds.

    {"reference", "curves", "paid": {student: {"tokens", "money"}}, "needs"}, as in `savings`.
    """
    paid = {
        name: stored["paid"]
        for name, stored in result["cost"]["outputs_by_student"].items()
        if "paid" in stored
    }
    curves = curves_in(result, VARIED_BOUGHT, lambda name: paid.get(name, {}).get("tokens"))
    if len(curves) < 2:
        return None
    reference = next(iter(curves))
    if not all(paid[name][key] for curve in curves.values() for name in curve for key in PAID):
        return None  # at no price there is nothing to compare
    needs = needs_of(curves, reference, paid, PAID, estimates, signs)
    return {"reference": reference, "curves": curves, "paid": paid, "needs": needs}


def needs_of(
    curves: dict[str, Curve],
    reference: str,
    costs: Mapping[str, Mapping[str, float]],
    keys: tuple[str, ...],
    estimates: Mapping[str, Mapping[str, Estimate]],
    signs: dict[str, int],
) -> dict[str, Any]:
    """{metric: {student of the reference: {curve: what it needs there}}}."""
    needs = {}
    for metric, sign in signs.items():
        measured = {n: c for n, c in curves.items() if all(metric in estimates[s] for s in c)}
        if reference not in measured:
            continue
        values = {s: estimates[s][metric] for curve in measured.values() for s in curve}
        needs[metric] = {
            target: {
                name: needed(curve, target, costs, keys, values, sign)
                for name, curve in measured.items()
                if name != reference
            }
            for target in curves[reference]
        }
    return needs


def reads_data(recipe: dict[str, Any]) -> bool:
    """Whether a student learns from the data's labels, without a teacher."""
    return recipe["access"] == "none" and recipe["sequences"] == "data"


def needed(
    curve: Curve,
    target: str,
    costs: Mapping[str, Mapping[str, float]],
    keys: tuple[str, ...],
    estimates: dict[str, Estimate],
    sign: int,
) -> dict[str, Any] | str:
    """What a curve costs at the quality of a student of the reference, as a ratio to that student's
    cost, with an interval that ends at the budgets tried; "less" than its smallest budget, "more"
    than its largest, or "unclear" where two budgets differ too little to interpolate."""
    names, quality = [*curve], estimates[target]
    reached = [sign * (estimates[name].mean - quality.mean) >= 0 for name in names]
    if reached[0]:
        return "less"
    if not any(reached):
        return "more"
    place = reached.index(True)
    low, high = estimates[names[place - 1]], estimates[names[place]]
    rise = high - low
    if sign * rise.mean <= LEAST_GAP * rise.standard_error():
        return "unclear"
    share = (quality - low) / rise
    found = {}
    for key in keys:
        ends = [math.log(costs[names[i]][key] / costs[target][key]) for i in (place - 1, place)]
        along = share * (ends[1] - ends[0])
        tried = [math.log(costs[name][key] / costs[target][key]) for name in names]
        bounds = [min(max(ends[0] + b, min(tried)), max(tried)) for b in along.interval]
        found[key] = {
            "ratio": math.exp(ends[0] + along.mean),
            "ci95": [math.exp(bound) for bound in bounds],
        }
    return found


def rows_read(result: dict[str, Any], curves: dict[str, Curve]) -> dict[str, dict[str, int]]:
    """How many different labels of the data, and answers of the teacher, a student has read."""
    batch_rows = result["config"]["students"]["training"]["batch_rows"]
    stored, read = result["cost"]["outputs_by_student"], {"labels": {}, "answers": {}}
    for name in (student for curve in curves.values() for student in curve):
        entry = result["students"][name]
        answers = stored[name]["rows"] if name in stored else 0
        seen = min(entry["steps"][0] * batch_rows, entry["rows"])
        read["labels"][name] = seen if reads_data(entry["recipe"]) else 0
        read["answers"][name] = answers
    return read
