"""Defence: what an extractor still gets of answers that are defended, and what customers lose.

A defence is a watermark of some strength, a lower temperature, or antidistillation. An extractor
is shown one kind of outputs and asks a number of prompts; of the students that could have learned
from these, the one nearest to the teacher counts. Its damage is how much nearer it would be without
the defence.
"""

import math
from typing import Any, NamedTuple

from measure.metrics import DIVERGENCE
from teacher.access import ACCESS


class Setting(NamedTuple):
    """bias: of the watermark, in nats, in the answers to a share of the prompts; antidistillation:
    its strength, with the recipe that stands for unknown students."""

    bias: float = 0.0
    temperature: float = 1.0
    antidistillation: float = 0.0
    share: float = 1.0
    proxy: str = ""


UNDEFENDED = Setting()


def setting_of(recipe: dict[str, Any]) -> Setting:
    outputs = recipe["outputs"]
    return Setting(
        outputs.get("watermark") or 0.0,
        outputs["temperature"],
        outputs.get("antidistillation") or 0.0,
        outputs.get("watermark_share") or 1.0,
        outputs.get("proxy") or "",
    )


def exposure_of(recipe: dict[str, Any]) -> str:
    """`text`, `top_k 5`."""
    counted = f" {recipe['outputs']['k']}" if ACCESS[recipe["access"]].uses_k else ""
    return f"{recipe['access']}{counted}"


def shown_by(recipe: dict[str, Any]) -> float:
    """How many log-probabilities beside each token a recipe needs: who is shown more can do it."""
    return ACCESS[recipe["access"]].sold(recipe["outputs"]["k"], math.inf)


def defence(
    result: dict[str, Any], prices: dict[Setting, dict[str, float]], marks: dict[str, list[float]]
) -> dict[str, Any] | None:
    """prices: what the teacher's answers are like with each setting, by metric. marks: the z of the
    watermark in the text of each student, by seed. None unless the teacher wrote outputs of one
    kind both defended and not.

    {"settings": [{**Setting, metric: value}], "cells": [{"exposure", "prompts", **Setting,
    "student", "divergence", "damage", "z"}]}; damage: None of what is undefended.
    """
    bought = {
        name: entry
        for name, entry in result["students"].items()
        if entry["recipe"]["sequences"] == "teacher" and entry["recipe"]["teachers"] == ["teacher"]
    }
    cells: dict[tuple, list[str]] = {}
    for entry in bought.values():
        recipe = entry["recipe"]
        prompts, setting = recipe["outputs"]["transfer_rows"] or 0, setting_of(recipe)
        budget = recipe["student"]["budget_fraction"]
        cells[exposure_of(recipe), prompts, budget, *setting] = [
            name
            for name, other in ((n, e["recipe"]) for n, e in bought.items())
            if (other["outputs"]["transfer_rows"] or 0) == prompts
            and other["student"]["budget_fraction"] == budget
            and setting_of(other) == setting
            and shown_by(other) <= shown_by(recipe)
        ]

    def divergence(name: str) -> float:
        return bought[name]["fidelity"][DIVERGENCE]["mean"]

    best = {cell: min(names, key=divergence) for cell, names in cells.items()}
    if len({cell[3:] for cell in cells}) < 2 or not any(c[3:] == UNDEFENDED for c in cells):
        return None
    found = []
    for cell, name in best.items():
        exposure, prompts, budget, *setting = cell
        free = best.get((exposure, prompts, budget, *UNDEFENDED))
        defended = Setting(*setting) != UNDEFENDED and free is not None
        found.append({
            "exposure": exposure,
            "prompts": prompts,
            **Setting(*setting)._asdict(),
            "student": name,
            "divergence": divergence(name),
            "damage": divergence(name) - divergence(free) if defended else None,
            "z": marks.get(name, []),
        })  # fmt: skip
    settings = [setting._asdict() | values for setting, values in prices.items()]
    return {"settings": settings, "cells": found}
