"""From a recipe to an objective, and from a student's recipe to those of its controls."""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from configs.schema import Config, Recipe
from student import objectives
from student.hidden import Shown, attention_match, hidden_match
from student.objectives import Objective
from teacher.signal import Signal


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


Match = Callable[[Shown, Tensor, Signal], Tensor]


def match_of(recipe: Recipe) -> Match | None:
    """The terms that look inside, as one function of (shown, positions [B, L], signal) -> [P];
    None for a recipe without any."""
    weights = {name: recipe.objective.get(name, 0) for name in ("hidden_match", "attention_match")}

    def match(shown: Shown, positions: Tensor, signal: Signal) -> Tensor:
        states = hidden_match(shown.projected[positions], signal)
        looks = attention_match(shown.attention[positions], signal)
        return weights["hidden_match"] * states + weights["attention_match"] * looks

    return match if any(weights.values()) else None


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
