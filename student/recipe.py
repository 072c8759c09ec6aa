"""From a recipe to an objective, and from a student's recipe to those of its controls."""

import math
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from configs.schema import Config, Recipe
from student import objectives
from student.hidden import Shown, attention_match, hidden_match
from student.objectives import Objective
from teacher.signal import Inside, Signal


def objective_of(recipe: Recipe) -> Objective:
    """The weighted sum of the recipe's terms as one function of (student_logits, signal) -> [M].

    Terms that look inside are no part of it: they compare other positions, see `match_of`.
    """
    divergence = {"temperature": recipe.temperature}
    functions = {
        "cross_entropy": objectives.cross_entropy,
        "forward_kl": partial(objectives.forward_kl, **divergence),
        "reverse_kl": partial(objectives.reverse_kl, **divergence),
        "generalised_jsd": partial(objectives.generalised_jsd, **divergence, beta=recipe.beta),
    }

    def objective(student_logits: Tensor, signal: Signal) -> Tensor:
        terms = [
            weight * functions[name](student_logits, signal)
            for name, weight in recipe.objective.items()
            if name in functions
        ]
        return sum(terms[1:], start=terms[0])

    return objective


@dataclass(frozen=True)
class Match:
    """The terms that look inside. They show a student the way, then fade: from their weight in the
    recipe to 0 at `until` of the training; what it has no room for would hold it back later on.
    """

    hidden: float
    attention: float
    until: float

    def steps(self, steps: int) -> int:
        """How many of the first steps of a training look inside."""
        return math.ceil(self.until * steps)

    def fade(self, step: int, steps: int) -> float:
        return max(0.0, 1 - step / (self.until * steps))

    def __call__(self, shown: Shown, positions: Tensor, inside: Inside) -> Tensor:
        """(what a student shows, positions [B, L], what the teacher revealed) -> [P]."""
        states = hidden_match(shown.projected[positions], inside)
        looks = attention_match(shown.attention[positions], inside)
        return self.hidden * states + self.attention * looks


def match_of(recipe: Recipe) -> Match | None:
    """The terms of a recipe that look inside, None for a recipe without any."""
    weights = [recipe.objective.get(name, 0.0) for name in ("hidden_match", "attention_match")]
    return Match(*weights, recipe.match_until) if any(weights) else None


def control_recipe(control: str, student: Recipe) -> Recipe:
    """The recipe of a control, given that of the student it keeps honest.

    alone     the data behind the teacher, at the same total FLOPs: do outputs teach better?
    scarce    only 5 % of the data, labelled by hand, same FLOPs: why does anyone distil?
    shuffled  the teacher's outputs for the wrong rows: must not help
    smoothed  the data with label smoothing of the teacher's entropy: is softness all there is?
    """
    data = Recipe(access="none", sequences="data", objective={"cross_entropy": 1.0})
    return {
        "alone": data,
        "scarce": data.model_copy(update={"label_fraction": 0.05}),
        "shuffled": student.model_copy(update={"shuffled": True}),
        "smoothed": data.model_copy(update={"smoothed": True, "objective": {"forward_kl": 1.0}}),
    }[control]


def recipes_of(config: Config) -> dict[str, Recipe]:
    """Every student and every control that is one, by name, in the order of the config. Controls
    follow the first student. The twin is no student: it is a second teacher."""
    first = next(iter(config.recipes.values()))
    controls = {name: control_recipe(name, first) for name in config.controls if name != "twin"}
    return {**config.recipes, **controls}
