"""Budgets: every student may spend the same FLOPs, and trains for as many steps as they allow."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from configs.schema import Config, LabError, Recipe
from experiment.cost import CountedForward, TrainingFlops
from experiment.experiment import Experiment, new_model
from models.rows import batch_order
from student.hidden import student_of
from student.loss import Loss
from student.training_set import TrainingSet


def steps_within_budget(
    experiment: Experiment,
    name: str,
    recipe: Recipe,
    model: nn.Module,
    data: TrainingSet,
    loss: Loss,
) -> tuple[int, float | None]:
    """(how many steps a student may train, None); if it writes its own rows, so that a step's cost
    is known only afterwards, (about how many steps, the FLOPs after which it must stop).

    LabError if the budget allows no step.
    """
    max_flops, stop_at = flops_left(experiment, recipe), None
    flops, plain = TrainingFlops(model), TrainingFlops(student_of(model))
    lengths = data.rows.lengths
    if data.on_policy:
        batch_rows = experiment.config.students.training.batch_rows
        steps, most = expected_steps(plain, data.on_policy, lengths, batch_rows, max_flops)
        stop_at = max_flops - most  # the last step must not exceed the budget
    else:
        steps = affordable_steps(flops, plain, lengths, data.order, max_flops, loss.hidden_steps)
    if steps < 1:
        raise no_budget(experiment.config, name)
    return steps, stop_at


def flops_left(experiment: Experiment, recipe: Recipe) -> float:
    """What is left of a student's budget after its prerequisites: outputs and an assistant."""
    config, run = experiment.config, experiment.run
    if config.students.tflops:
        budget = 1e12 * config.students.tflops
    else:
        budget = config.students.budget * run.cost_of("teacher")["flops"]
    prepaid = sum(run.cost_of(stage)["flops"] for stage in experiment.plan.prerequisites(recipe))
    return recipe.student.budget_fraction * budget - prepaid


def affordable_steps(
    with_projections: TrainingFlops,
    plain: TrainingFlops,
    lengths: np.ndarray,
    order: Callable[[int], np.ndarray],
    max_flops: float,
    hidden_steps: Callable[[int], int],
) -> int:
    """How many steps on rows of these lengths a budget of FLOPs allows. Of n steps the first
    hidden_steps(n) cost `with_projections`, the others `plain`."""
    spent, extra = [0], [0]  # after n steps: plain, and the extra cost of hidden states
    while spent[-1] <= max_flops:
        batch = lengths[order(len(spent) - 1)]
        spent.append(spent[-1] + plain.of_batch(batch))
        extra.append(extra[-1] + with_projections.of_batch(batch) - plain.of_batch(batch))
    affordable = [n for n in range(len(spent)) if spent[n] + extra[hidden_steps(n)] <= max_flops]
    return max(affordable, default=0)


def expected_steps(
    plain: TrainingFlops, policy: Any, lengths: np.ndarray, batch_rows: int, max_flops: float
) -> tuple[int, float]:
    """(about how many steps a budget allows, the FLOPs of the most expensive possible step) if the
    student writes the rows of some steps, about as long as these lengths. The exact cost is known
    only during training, which ends when the budget is spent."""

    def per_row(length: int, share: float) -> float:
        scoring, step = 0.0, plain.of_row(length)
        if policy.teacher is not None:
            before = policy.teacher.flops
            ids = torch.ones((1, length), dtype=torch.long, device=policy.teacher.device)
            policy.teacher(ids, use_cache=False)
            scoring = policy.teacher.flops - before
        return step + share * (step / 3 + scoring)  # a forward pass is a third of a step

    rows = min(batch_rows, len(lengths))
    share = float(np.mean([policy.share(progress) for progress in np.linspace(0, 1, 101)]))
    longest = int(policy.rows.prompt_lengths.max()) + policy.longest
    max_step_flops = rows * per_row(longest, 1.0)
    mean_step_flops = rows * per_row(round(float(lengths.mean())), share)
    return max(0, int((max_flops - max_step_flops) / mean_step_flops)), max_step_flops


def check_budgets(experiment: Experiment) -> None:
    """LabError for a budget that leaves no FLOPs for training, estimated from shapes before
    anything trains: outputs are assumed to be as long as the answers in the data."""
    config, plan, rows = experiment.config, experiment.plan, experiment.rows
    if not config.students.budget or config.teacher.epochs == 0:
        return  # in TFLOPs, or a fraction of a cost that is known only after training
    model = new_model(experiment, config.teacher.model, 0)
    mean_length = round(float(rows.lengths.mean()))
    order = batch_order(rows.lengths, config.teacher.training.batch_rows, 0)
    teacher_steps = max(1, round(config.teacher.epochs * order.per_epoch))
    teacher_rows = teacher_steps * min(config.teacher.training.batch_rows, len(rows))
    teacher_flops = teacher_rows * TrainingFlops(model).of_row(mean_length)
    forward = CountedForward(model)
    forward(torch.zeros((1, mean_length), dtype=torch.long), use_cache=False)
    for name, recipe in plan.recipes.items():
        budget = recipe.student.budget_fraction * config.students.budget * teacher_flops
        request = plan.request(recipe)
        if request and recipe.outputs.charged and set(recipe.teachers) <= set(plan.teachers):
            budget -= (request.transfer_rows or len(rows)) * len(recipe.teachers) * forward.flops
        settings = config.model_of(recipe)
        if settings.pretrained:
            continue
        student = TrainingFlops(new_model(experiment, settings, 0))
        batch_rows = min(config.students.training.batch_rows, len(rows))
        if budget < batch_rows * student.of_row(int(rows.lengths.min())):
            raise no_budget(config, name)


def no_budget(config: Config, name: str) -> LabError:
    key = "budget" if config.students.budget else "tflops"
    value = config.students.budget or config.students.tflops
    return LabError(
        f"{name}: students.{key} {value:g} leaves no FLOPs for training after the outputs; raise "
        "it, or lower the recipe's outputs.transfer_rows"
    )
