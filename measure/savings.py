"""Savings: which fraction of the baseline's cost a student needs for the same quality.

Students that differ only in their budget are a curve of quality against cost. For the quality of
each student of the reference curve, the cost at which another curve reaches it is interpolated
between two neighbouring budgets, linearly in the logarithm of the cost. Nothing is extrapolated.
"""

import json
import math
from collections.abc import Mapping
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

Curve = dict[str, float]  # {student: its budget}, from the smallest


def curves_in(result: dict[str, Any]) -> dict[str, Curve]:
    """{name: curve} of students with three or more budgets; `text_2` belongs to `text`."""
    groups: dict[str, Curve] = {}
    for name, entry in result["students"].items():
        kind = json.dumps(without_keys(entry["recipe"], VARIED), sort_keys=True)
        groups.setdefault(kind, {})[name] = entry["recipe"]["student"]["budget_fraction"]
    found = {}
    for group in groups.values():
        if len(set(group.values())) == len(group) >= 3:
            kind = next(iter(group)).rstrip("_-0123456789")
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
    curves = curves_in(result)
    students, costs = result["students"], result["cost"]["fraction_of_teacher_by_student"]
    recipes = {name: students[next(iter(curve))]["recipe"] for name, curve in curves.items()}
    reference = next((name for name, recipe in recipes.items() if reads_data(recipe)), None)
    known = all(costs[name]["flops"] for curve in curves.values() for name in curve)
    if reference is None or len(curves) < 2 or not known:
        return None
    needs = {}
    for metric, sign in signs.items():
        measured = {n: c for n, c in curves.items() if all(metric in estimates[s] for s in c)}
        if reference not in measured:
            continue
        values = {s: estimates[s][metric] for curve in measured.values() for s in curve}
        needs[metric] = {
            target: {
                name: needed(curve, target, costs, values, sign)
                for name, curve in measured.items()
                if name != reference
            }
            for target in curves[reference]
        }
    return {"reference": reference, "curves": curves, "needs": needs, **rows_read(result, curves)}


def reads_data(recipe: dict[str, Any]) -> bool:
    """Whether a student learns from the data's labels, without a teacher."""
    return recipe["access"] == "none" and recipe["sequences"] == "data"


def needed(
    curve: Curve,
    target: str,
    costs: dict[str, dict[str, float]],
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
    for key in COSTS:
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
