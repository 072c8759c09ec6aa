"""Scaling laws: how the divergence from the teacher depends on how many rows it answered, and on
the size of the student.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import optimize

from measure.metrics import DIVERGENCE
from measure.statistics import Estimate, joint_draws

LAW_DRAWS = 200  # fits, for the intervals of a law
SAME_MINIMUM = 1.5  # a minimum that moves by a larger factor is another one


@dataclass(frozen=True)
class Law:
    """y = a x^-b + c x^d, all four at least 0. With d = 0 it falls to c; otherwise it has a
    minimum: at a fixed budget a model that is too large is trained too little."""

    a: float
    b: float
    c: float
    d: float = 0.0

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return self.a * x**-self.b + self.c * x**self.d

    @property
    def minimum_at(self) -> float | None:
        if min(self.a, self.b, self.c, self.d) <= 0:
            return None
        return (self.a * self.b / (self.c * self.d)) ** (1 / (self.b + self.d))

    def __str__(self) -> str:
        turning = f" x^{self.d:.2f}" if self.d else ""
        return f"{self.a:.3g} x^-{self.b:.2f} + {self.c:.3g}{turning}"


def fit_law(
    x: np.ndarray, y: np.ndarray, has_minimum: bool = False, near: Law | None = None
) -> Law | None:
    """The law through positive points, by least squares of logarithms; None unless there are more
    points than parameters. near: a law to start from, instead of many.

    Hoffmann et al. 2022, arXiv 2203.15556: equation 2 with either the data or the FLOPs fixed (at
    fixed FLOPs a larger model sees less data, so that its second term rises with the size); they
    fit it with a Huber loss.
    """
    parameters = 4 if has_minimum else 3
    if len(x) <= parameters:
        return None
    middle, least = float(np.exp(np.log(x).mean())), float(y.min())

    def residuals(law: np.ndarray) -> np.ndarray:
        log_a, b, log_c, d = [*law, 0.0][:4]
        along = np.log(x / middle)
        return np.logaddexp(log_a - b * along, log_c + d * along) - np.log(y)

    low, high = [-np.inf, 0, -np.inf, 0][:parameters], [np.inf, 5, np.inf, 5][:parameters]
    starts = [
        [np.log(height), slope, np.log(share * least), 0.3][:parameters]
        for share in (0.1, 0.5, 0.9)
        for height in (least, float(y.max()))
        for slope in (0.3, 1.0, 2.0)
    ]
    if near:
        heights = near.a * middle**-near.b, near.c * middle**near.d
        log_height, log_rest = np.log(np.maximum(heights, 1e-12 * least))
        starts = [[log_height, near.b, log_rest, near.d][:parameters]]
    found = [optimize.least_squares(residuals, start, bounds=(low, high)) for start in starts]
    log_a, b, log_c, d = [*min(found, key=lambda one: one.cost).x, 0.0][:4]
    scaled = np.exp(log_a) * middle**b, b, np.exp(log_c) * middle**-d, d
    return Law(*map(float, scaled))


def students_differing_in(result: dict[str, Any], keys: tuple[str, ...]) -> list[str]:
    """The largest group of students whose recipes differ in these keys (as in `outputs.k`) and in
    nothing else, and whose distributions were compared with the teacher's."""
    groups: dict[str, list[str]] = {}
    stored = result["cost"]["outputs_by_student"]
    for name, entry in result["students"].items():
        if isinstance(entry["recipe"]["temperature"], dict) or name not in stored:
            continue  # scheduled, or without stored outputs: no single x
        if DIVERGENCE not in entry["fidelity"]:
            continue  # trained on answers without reasoning
        rest = without_keys(entry["recipe"], (*keys, "student.learning_rate", "student.seeds"))
        groups.setdefault(json.dumps(rest, sort_keys=True), []).append(name)
    return max(groups.values(), key=len, default=[])


def without_keys(settings: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """Nested settings without the keys given by their paths."""
    here = {path for path in keys if "." not in path}
    below = [path.partition(".") for path in keys if "." in path]
    return {
        key: without_keys(value, tuple(rest for first, _, rest in below if first == key))
        if isinstance(value, dict)
        else value
        for key, value in settings.items()
        if key not in here
    }


def scaling_laws(
    result: dict[str, Any], estimates: Mapping[str, Estimate] | None = None
) -> dict[str, Any]:
    """{"rows" or "size": the law of a study} of three or more students that differ in nothing else.
    estimates: of each student's divergence from the teacher, for the law's intervals."""
    students, outputs = result["students"], result["cost"]["outputs_by_student"]
    # Prompts that a teacher invented are other words than those of the data: a study of their own.
    rows = students_differing_in(result, ("outputs.transfer_rows",))
    sizes = students_differing_in(result, ("student.model",))
    # A student charged for more rows trains for fewer steps: not only the rows differ.
    rows = [name for name in rows if not students[name]["recipe"]["outputs"]["charged"]]
    studies = {
        "rows": {name: outputs[name]["different"] for name in rows},
        "size": {name: students[name]["params"] / result["teacher"]["params"] for name in sizes},
    }
    return {
        study: law_of(x, result, [estimates[name] for name in x] if estimates else None, study)
        for study, x in studies.items()
        if len(x) >= 3
    }


def law_of(
    x: dict[str, float], result: dict[str, Any], estimates: list[Estimate] | None, study: str
) -> dict[str, Any]:
    """{"x" by student, "law": its parameters or None where there are too few points, "law_ci95",
    "residuals" by student, "minimum_at", "minimum_ci95", "minimum_without": that of a fit without
    each student, "identified": whether these agree}.

    Intervals are those of fits to values that other seeds and rows could have given; they do not
    cover a law of another form. A minimum is identified if no student decides where it is.
    """
    has_minimum, names = study == "size", [*x]
    at = np.array([*x.values()], float)
    kls = np.array([result["students"][name]["fidelity"][DIVERGENCE]["mean"] for name in names])
    law = fit_law(at, kls, has_minimum)
    found: dict[str, Any] = {"x": x, "law": None, "minimum_at": None}
    if law is None:
        return found
    residuals = kls / law(at) - 1
    found |= {
        "law": [law.a, law.b, law.c, law.d],
        "residuals": dict(zip(names, residuals.tolist(), strict=True)),
        "minimum_at": law.minimum_at,
    }
    if estimates:
        drawn = joint_draws(estimates, LAW_DRAWS)
        laws = [fit_law(at, np.maximum(values, 1e-9), has_minimum, law) for values in drawn]
        parameters = np.array([[one.a, one.b, one.c, one.d] for one in laws])
        found["law_ci95"] = np.percentile(parameters, [2.5, 97.5], axis=0).T.tolist()
        found["minimum_ci95"] = minimum_interval(laws, at)
    if has_minimum:
        without = {}
        for i, name in enumerate(names):
            rest = fit_law(np.delete(at, i), np.delete(kls, i), has_minimum)
            place = rest and rest.minimum_at
            without[name] = place if place and at.min() < place < at.max() else None
        found |= {"minimum_without": without, "identified": agree(law.minimum_at, without, at)}
        if estimates and None in found["minimum_ci95"]:
            found["identified"] = False
    return found


def minimum_interval(laws: list[Law], x: np.ndarray) -> list[float | None]:
    """The 95 % interval of the minima; None for a bound beyond the points."""
    minima = [np.inf if law.minimum_at is None else law.minimum_at for law in laws]
    bounds = np.percentile(minima, [2.5, 97.5], method="nearest")
    return [float(bound) if x.min() < bound < x.max() else None for bound in bounds]


def agree(minimum: float | None, without: dict[str, float | None], x: np.ndarray) -> bool:
    """Whether a minimum lies within the points, and stays where it is without any one of them."""
    others = [*without.values()]
    if minimum is None or not x.min() < minimum < x.max() or None in others:
        return False
    moved = max(abs(np.log(other / minimum)) for other in others)
    return bool(moved <= np.log(SAME_MINIMUM))
