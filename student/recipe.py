"""From a recipe to an objective, and from a student's recipe to those of its controls."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from configs.schema import INSIDE, Config, Recipe, Schedule, Scheduled, value_at
from student import objectives
from student.hidden import Shown, attention_match, hidden_match, relation_match
from teacher.signal import Inside, Signal

# (student_logits [M, V], signal, progress of the training from 0 to 1) -> [M] nats
Objective = Callable[[Tensor, Signal, float], Tensor]


FIRST_ORDER = ("total_variation", "sorted_distance")  # these carry T, the others T^2


def objective_of(recipe: Recipe) -> Objective:
    """The weighted sum of the recipe's terms, weights and temperature as they are at `progress`.

    Terms that look inside are no part of it: they compare other positions, see `match_of`.
    """
    divergences = {
        "forward_kl": objectives.forward_kl,
        "reverse_kl": objectives.reverse_kl,
        "generalised_jsd": partial(objectives.generalised_jsd, beta=recipe.beta),
        "skewed_forward_kl": partial(objectives.skewed_forward_kl, skew=recipe.skew),
        "skewed_reverse_kl": partial(objectives.skewed_reverse_kl, skew=recipe.skew),
        "adaptive_kl": partial(objectives.adaptive_kl, head=recipe.head),
        "total_variation": objectives.total_variation,
        "sorted_distance": objectives.sorted_distance,
    }

    def objective(student_logits: Tensor, signal: Signal, progress: float = 0.0) -> Tensor:
        temperature = value_at(recipe.temperature, progress)
        total = 0
        for name, weight in recipe.objective.items():
            if name in divergences:
                term = divergences[name](student_logits, signal, temperature=temperature)
                if not recipe.temperature_squared:
                    term = term / temperature ** (1 if name in FIRST_ORDER else 2)
            elif name == "cross_entropy":
                term = objectives.cross_entropy(student_logits, signal)
            elif name == "policy_gradient":
                term = objectives.policy_gradient(student_logits, signal)
            else:
                continue
            total = total + value_at(weight, progress) * term
        return total

    return objective


# What a teacher learns by, and a student without one.
FROM_TEXT = Recipe(access="none", objective={"cross_entropy": 1.0})


@dataclass(frozen=True)
class Match:
    """The terms that look inside, with their weights. They show a student the way best when they
    fade to 0 before the end: what it has no room for would hold it back later on.
    """

    hidden: Scheduled
    attention: Scheduled
    relation: Scheduled = 0.0

    @property
    def until(self) -> float:
        """The progress from which on all weights are 0."""
        fades = [
            weight.until if isinstance(weight, Schedule) and weight.end == 0 else 1.0
            for weight in (self.hidden, self.attention, self.relation)
            if weight
        ]
        return max(fades)

    def steps(self, steps: int) -> int:
        """How many of the first steps of a training look inside."""
        return math.ceil(self.until * steps)

    def __call__(
        self, shown: Shown, positions: Tensor, inside: Inside, progress: float = 0.0
    ) -> Tensor:
        """(what a student shows, positions [B, L], what the teacher revealed) -> [P]."""
        states = hidden_match(shown.projected[positions], inside)
        looks = attention_match(shown.attention[positions], inside)
        missed = value_at(self.hidden, progress) * states
        missed = missed + value_at(self.attention, progress) * looks
        if self.relation:
            relations = relation_match(shown.attention[positions], inside)
            missed = missed + value_at(self.relation, progress) * relations
        return missed


def match_of(recipe: Recipe) -> Match | None:
    """The terms of a recipe that look inside, None for a recipe without any."""
    weights = [recipe.objective.get(name, 0.0) for name in INSIDE]
    return Match(*weights) if any(weights) else None


def control_recipe(control: str, student: Recipe) -> Recipe:
    """The recipe of a control, given that of the student it keeps honest.

    alone     the data behind the teacher, at the same total FLOPs: do outputs teach better?
    scarce    only 5 % of the data, labelled by hand, same FLOPs: why does anyone distil?
    shuffled  the teacher's outputs for the wrong rows: must not help
    smoothed  the data with label smoothing of the teacher's entropy: is softness all there is?
    """
    smoothed = {"smoothed": True, "objective": {"forward_kl": 1.0}}
    return {
        "alone": FROM_TEXT,
        "scarce": FROM_TEXT.model_copy(update={"label_fraction": 0.05}),
        "shuffled": student.model_copy(update={"shuffled": True}),
        "smoothed": FROM_TEXT.model_copy(update=smoothed),
    }[control]


def waves_of(config: Config) -> list[dict[str, Recipe]]:
    """The same in the order of training: who teaches others comes in an earlier wave."""
    recipes = recipes_of(config)
    waves = [{name: recipes[name] for name in wave} for wave in config.waves()]
    controls = {name: recipe for name, recipe in recipes.items() if name not in config.recipes}
    waves[-1] |= controls  # shuffled and smoothed need outputs of a recipe
    return waves


def recipes_of(config: Config) -> dict[str, Recipe]:
    """Every student and every control that is one, by name, in the order of the config. Controls
    follow the first student. The twin is no student: it is a second teacher."""
    first = next(iter(config.recipes.values()))
    controls = {name: control_recipe(name, first) for name in config.controls if name != "twin"}
    return {**config.recipes, **controls}
