"""Scaling laws: how the divergence from the teacher depends on the number of words it answered, and
on the size of the student.
"""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import optimize


@dataclass(frozen=True)
class Law:
    """y = a x^-b + c x^d, with all four at least 0. d = 0: it falls to c. Else it turns: whoever is
    too large for a fixed budget is trained too little."""

    a: float
    b: float
    c: float
    d: float = 0.0

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return self.a * x**-self.b + self.c * x**self.d

    @property
    def least_at(self) -> float | None:
        """Where it turns."""
        if min(self.a, self.b, self.c, self.d) <= 0:
            return None
        return (self.a * self.b / (self.c * self.d)) ** (1 / (self.b + self.d))

    def __str__(self) -> str:
        turning = f" x^{self.d:.2f}" if self.d else ""
        return f"{self.a:.3g} x^-{self.b:.2f} + {self.c:.3g}{turning}"


def fit_law(x: np.ndarray, y: np.ndarray, turns: bool = False) -> Law | None:
    """The law through points of positive numbers, by least squares of logarithms; None where there
    are no more points than the law has numbers.

    Hoffmann et al. 2022, arXiv 2203.15556: equation 2 with either the words or the FLOPs fixed (of
    fixed FLOPs a larger model sees less, so that its second term rises with the size); they fit it
    with a Huber loss.
    """
    numbers = 4 if turns else 3
    if len(x) <= numbers:
        return None
    middle, least = float(np.exp(np.log(x).mean())), float(y.min())

    def apart(law: np.ndarray) -> np.ndarray:
        log_a, b, log_c, d = [*law, 0.0][:4]
        along = np.log(x / middle)
        return np.logaddexp(log_a - b * along, log_c + d * along) - np.log(y)

    low, high = [-np.inf, 0, -np.inf, 0][:numbers], [np.inf, 5, np.inf, 5][:numbers]
    starts = [
        [np.log(height), slope, np.log(share * least), 0.3][:numbers]
        for share in (0.1, 0.5, 0.9)
        for height in (least, float(y.max()))
        for slope in (0.3, 1.0, 2.0)
    ]
    found = [optimize.least_squares(apart, start, bounds=(low, high)) for start in starts]
    log_a, b, log_c, d = [*min(found, key=lambda one: one.cost).x, 0.0][:4]
    scaled = np.exp(log_a) * middle**b, b, np.exp(log_c) * middle**-d, d
    return Law(*map(float, scaled))


def alike(result: dict[str, Any], but_for: tuple[str, ...]) -> list[str]:
    """The largest group of students whose recipes differ in these keys and in nothing else, and
    whose distributions were compared with the teacher's."""
    groups: dict[str, list[str]] = {}
    stored = result["cost"]["outputs_by_student"]
    for arm, entry in result["students"].items():
        if isinstance(entry["recipe"]["temperature"], dict) or arm not in stored:
            continue  # one that changes on the way; nothing to count
        if "kl_teacher_student" not in entry["fidelity"]:
            continue  # answers alone are no distributions over traces
        rest = {key: value for key, value in entry["recipe"].items() if key not in but_for}
        groups.setdefault(json.dumps(rest, sort_keys=True), []).append(arm)
    return max(groups.values(), key=len, default=[])


def scaling_laws(result: dict[str, Any]) -> dict[str, Any]:
    """{"words" or "size": {"x" by student, "law" or None where there are too few points, and where
    it is "least_at"}} for studies of three students or more that differ in nothing else."""
    students, outputs = result["students"], result["cost"]["outputs_by_student"]
    words, sizes = alike(result, ("transfer_rows", "prompts")), alike(result, ("model",))
    # Who pays for more words trains for fewer steps: no study of words alone.
    words = [arm for arm in words if not students[arm]["recipe"].get("charged", True)]
    whole = result["teacher"]["params"]
    studies = {
        "words": {arm: outputs[arm]["different"] for arm in words},
        "size": {arm: students[arm]["params"] / whole for arm in sizes},
    }
    found = {}
    for name, x in studies.items():
        if len(x) < 3:
            continue
        kls = [students[arm]["fidelity"]["kl_teacher_student"]["mean"] for arm in x]
        law = fit_law(np.array([*x.values()], float), np.array(kls), turns=name == "size")
        found[name] = {
            "x": x,
            "law": law and [law.a, law.b, law.c, law.d],
            "least_at": law and law.least_at,
        }
    return found
