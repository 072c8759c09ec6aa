"""From a recipe to its loss terms, and from a student's recipe to the recipes of its controls."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from configs.schema import (
    ControlSettings,
    OutputsSettings,
    Recipe,
    Schedule,
    Scheduled,
    StudentSettings,
    value_at,
)
from student.hidden import StudentOutput
from student.objectives import OBJECTIVES
from teacher.signal import HiddenSignal, Signal

# (student_logits [M, V], signal, progress of the training from 0 to 1) -> [M] nats
LossFunction = Callable[[Tensor, Signal, float], Tensor]

# Training on text: for a teacher, and for a student without one.
FROM_TEXT = Recipe(access="none", objective={"cross_entropy": 1.0})
# A teacher's own answers, as it samples them.
ANSWERS = Recipe(
    access="text",
    sequences="teacher",
    objective={"cross_entropy": 1.0},
    outputs=OutputsSettings(temperature=1.0),
)


def objective_of(recipe: Recipe) -> LossFunction:
    """The weighted sum of a recipe's terms over the vocabulary, with the weights and temperature at
    `progress`. Terms over hidden states are separate, see `hidden_loss_of`."""
    terms = {name: OBJECTIVES[name] for name in recipe.objective}

    def objective(student_logits: Tensor, signal: Signal, progress: float = 0.0) -> Tensor:
        temperature = value_at(recipe.temperature, progress)
        total = 0
        for name, term in terms.items():
            if term.over_states:
                continue
            options = {key: getattr(recipe.divergence, key) for key in term.parameters}
            if term.order:
                options["temperature"] = temperature
            loss = term.function(student_logits, signal, **options)
            if term.order and not recipe.divergence.temperature_squared:
                loss = loss / temperature**term.order
            total = total + value_at(recipe.objective[name], progress) * loss
        return total

    return objective


@dataclass(frozen=True)
class HiddenLoss:
    """A recipe's terms over hidden states, with their weights. Anneal them to 0: a small student
    cannot keep matching everything.
    """

    weights: dict[str, Scheduled]

    @property
    def until(self) -> float:
        """The progress from which on all weights are 0."""
        return max(
            weight.until if isinstance(weight, Schedule) and weight.end == 0 else 1.0
            for weight in self.weights.values()
        )

    def steps(self, steps: int) -> int:
        """How many of the first steps of a training use hidden states."""
        return math.ceil(self.until * steps)

    def __call__(
        self, output: StudentOutput, hidden: HiddenSignal, progress: float = 0.0
    ) -> Tensor:
        """(student at P positions, teacher there) -> [P]."""
        losses = [
            value_at(weight, progress) * OBJECTIVES[name].function(output, hidden)
            for name, weight in self.weights.items()
        ]
        return sum(losses[1:], losses[0])


def hidden_loss_of(recipe: Recipe) -> HiddenLoss | None:
    """The terms of a recipe over hidden states; None if it has none."""
    weights = {n: w for n, w in recipe.objective.items() if OBJECTIVES[n].over_states}
    return HiddenLoss(weights) if weights else None


def uses_relations(recipe: Recipe) -> bool:
    """Whether a recipe matches value relations."""
    return any(OBJECTIVES[name].needs == "relations" for name in recipe.objective)


def projects(recipe: Recipe) -> bool:
    """Whether a recipe matches hidden states, through projections."""
    return any(OBJECTIVES[name].projects for name in recipe.objective)


def learns_from_rewards(recipe: Recipe) -> bool:
    """Whether a recipe learns from right/wrong rewards, without text and without a teacher."""
    return any(OBJECTIVES[name].needs == "reward" for name in recipe.objective)


def compares_ids(recipe: Recipe) -> bool:
    """Whether a recipe compares probabilities token by token, so that teacher and student need the
    same vocabulary."""
    return any(OBJECTIVES[name].needs in ("samples", "outcomes") for name in recipe.objective)


def control_recipe(control: str, student: Recipe) -> Recipe:
    """The recipe of a control, given that of the student it is compared with; CONTROLS in
    configs/schema.py states what each is for."""

    def changed(recipe: Recipe, **settings: object) -> Recipe:
        return recipe.model_copy(update={"control": ControlSettings(**settings)})

    smoothed = FROM_TEXT.model_copy(update={"objective": {"forward_kl": 1.0}})
    all_answers = student.outputs.model_copy(update={"traces": "all"})
    same_cost = student.student.model_dump(include={"model", "budget_fraction", "seeds"})
    gold = FROM_TEXT.model_copy(
        update={"outputs": all_answers, "student": StudentSettings(**same_cost)}
    )
    return {
        "baseline": FROM_TEXT,
        "low_data": changed(FROM_TEXT, label_fraction=0.05),
        "shuffled": changed(student, shuffled=True),
        "gold": changed(gold, gold=True),
        "smoothed": changed(smoothed, smoothed=True),
    }[control]
