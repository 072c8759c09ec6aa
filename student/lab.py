"""The lab: what a stage of a run works with, and what a student of a recipe begins with there.

The training and the checks of a finished run open it alike, so that both mean the same lessons.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from configs.runs import Run
from configs.schema import DIVERGENCES, Config, LabError, Model, Recipe, Training
from student.hidden import Projected
from student.lessons import Lessons, answers_alone, scarce, smoothed_labels
from student.on_policy import OnPolicy
from student.recipe import Match, Objective, match_of
from student.step import Goal
from tasks import load_task
from tasks.rows import Rows
from tasks.task import Task
from teacher.model import (
    Averaged,
    Forward,
    build_model,
    initialise,
    load_model,
    load_pretrained,
    load_tokenizer,
    take_layers,
)
from teacher.outputs import (
    name_of,
    needs_outputs,
    outputs_binding,
    stage_of_teacher,
    transfer_rows,
)
from teacher.shards import Outputs
from teacher.vocabulary import differing_id, same_vocabulary

if TYPE_CHECKING:
    from accelerate import Accelerator

BY_TOKEN = ("kl_", "top1_agreement", "nll_gap", "ece")  # metrics

Counted = Callable[[nn.Module], Forward]  # wraps a model so that its forward passes are counted


@dataclass(frozen=True)
class Lab:
    config: Config
    run: Run
    task: Task
    rows: Rows  # the training split
    validation: Rows
    accelerator: "Accelerator | None" = None  # where something is trained


def open_lab(config: Config, run: Run, accelerator: "Accelerator | None" = None) -> Lab:
    task = load_task(config.task)
    return Lab(config, run, task, task.rows("train"), task.rows("validation"), accelerator)


def new_model(lab: Lab, settings: Model, seed: int) -> nn.Module:
    """An untrained model of the lab's vocabulary and precision; or a pretrained one, as it is."""
    if settings.pretrained:
        return load_pretrained(settings.pretrained).to(getattr(torch, lab.config.precision))
    model = build_model(settings, lab.task.tokenizer, lab.task.longest_row)
    return initialise(model.to(getattr(torch, lab.config.precision)), seed)


def new_student(lab: Lab, recipe: Recipe, lessons: Lessons, seed: int) -> nn.Module:
    """A student before its first step: the same weights per seed in all recipes of one shape, or
    layers of its teacher, where that is a recipe those of its student of the same seed; with
    projections if it is to match states."""
    model = new_model(lab, lab.config.model_of(recipe), seed)
    if recipe.initial_layers:
        taught_by = stage_of_teacher(recipe.teachers[0], lab.config, seed)
        model = take_layers(model, load_model(lab.run.folder / taught_by), recipe.initial_layers)
    if not match_of(recipe):
        return model
    return Projected(model, lessons.width, seed, recipe.relations)


def goal_of(lab: Lab, objective: Objective, match: Match | None, training: Training) -> Goal:
    """What a training in this lab minimises."""
    tokenizer = lab.task.tokenizer
    return Goal(objective, match, tokenizer.pad_token_id, len(tokenizer), training.prompt_weight)


def teacher_of(lab: Lab, recipe: Recipe, counted: Counted) -> Forward:
    """Who teaches a recipe; the mean of several."""
    folders = [lab.run.folder / stage_of_teacher(name, lab.config) for name in recipe.teachers]
    compared = set(recipe.objective) & set(DIVERGENCES) - {"sorted_distance"}
    if compared:
        for folder in folders:
            same_vocabulary(load_tokenizer(folder), lab.task.tokenizer, f"access {recipe.access}")
    device = lab.accelerator.device if lab.accelerator else torch.device("cpu")
    models = [counted(load_model(folder).to(device)) for folder in folders]
    return models[0] if len(models) == 1 else Averaged(models, len(lab.task.tokenizer))


def teachers_task(
    config: Config, run: Run, task: Task, names: Sequence[str] = ("teacher",)
) -> Task:
    """The task in the words of who teaches: the same, but for a pretrained teacher that has
    another tokenizer."""
    if not config.teacher.model.pretrained or names[0] != "teacher":
        return task
    if differing_id(load_tokenizer(run.teacher), task.tokenizer) is None:
        return task
    return load_task(config.task.model_copy(update={"tokenizer": str(run.teacher)}))


def try_vocabularies(lab: Lab) -> None:
    """LabError if pretrained models have other tokens than they need, before a run folder is made.
    A student must have those of the task; a teacher may have its own where nothing compares ids."""
    config, ours = lab.config, lab.task.tokenizer
    models = {"students.model": config.students.model}
    models |= {f"recipes.{name}.model": r.model for name, r in config.recipes.items() if r.model}
    for key, model in models.items():
        if model.pretrained and differing_id(load_tokenizer(model.pretrained), ours) is not None:
            raise LabError(
                f"{key}.pretrained {model.pretrained!r} has other tokens than task "
                f"{config.task.name}; the tokenizer of a task is that of its students"
            )
    if not config.teacher.model.pretrained:
        return
    theirs = load_tokenizer(config.teacher.model.pretrained)
    if differing_id(theirs, ours) is None:
        return
    if config.task.name != "gsm8k" or config.teacher.epochs > 0:
        same_vocabulary(
            theirs, ours, "teacher.model.pretrained", "leave it as it is (epochs 0), on task gsm8k"
        )
    for recipe in config.recipes.values():
        compares = set(recipe.objective) - {"cross_entropy", "sorted_distance"}
        reads = recipe.sequences != "teacher" or recipe.writes_itself
        if recipe.access != "none" and (compares or reads):
            same_vocabulary(theirs, ours, f"access {recipe.access}")
    for claim in config.claims():
        if claim.metric.startswith(BY_TOKEN):
            raise LabError(
                f"verdict {claim.claim!r}: {claim.metric} compares token by token, and the teacher "
                "has other tokens than its students; choose another metric"
            )


def teacher_sha256(lab: Lab, recipe: Recipe, seed: int | None = None) -> str:
    """Of who teaches a recipe; with a seed, of who its student of that seed descends from."""
    stages = lab.run.manifest["stages"]
    paired = seed if recipe.initial_layers else None
    names = [stage_of_teacher(name, lab.config, paired) for name in recipe.teachers]
    return "+".join(stages[name]["sha256"] for name in names)


def tokenizer_sha256(task: Task) -> str:
    return hashlib.sha256(task.tokenizer.backend_tokenizer.to_str().encode("utf-8")).hexdigest()


def binding_of(lab: Lab, recipe: Recipe) -> dict[str, Any]:
    """What the outputs of a recipe must be bound to in this run."""
    return outputs_binding(
        recipe,
        teacher_sha256=teacher_sha256(lab, recipe),
        tokenizer_sha256=lab.run.manifest["data"]["tokenizer"],
        rows=lab.rows,
        seed=lab.config.teacher.seed,
    )


def outputs_of(lab: Lab, recipe: Recipe) -> Outputs:
    return Outputs(lab.run.folder / "outputs" / name_of(recipe), binding_of(lab, recipe))


def lessons_of(lab: Lab, recipe: Recipe, seed: int, counted: Counted) -> Lessons:
    """The rows that a recipe trains on, and the signal at each of their positions."""
    if needs_outputs(recipe):
        outputs = outputs_of(lab, recipe)
        if recipe.shuffled:
            outputs = outputs.shuffle(seed)
        if recipe.traces == "right":
            right = [i for i in range(len(outputs.rows)) if lab.task.is_right(outputs.rows, i)]
            if not right:
                raise LabError(
                    f"outputs/{name_of(recipe)}: no row ends with a right answer, so that traces: "
                    "right leaves nothing to learn from; use a better teacher or more transfer_rows"
                )
            outputs = outputs.keep(np.asarray(right, int))
        lessons = Lessons(outputs.rows, outputs.signal)
        if recipe.traces == "none":
            lessons = Lessons(answers_alone(outputs.rows, lab.task))
        if recipe.access == "hidden":
            lessons = replace(lessons, inside=outputs.inside, width=outputs.hidden_width)
    elif recipe.sequences == "student":
        lessons = Lessons(lab.rows.take(transfer_rows(lab.rows, recipe)))
    elif recipe.smoothed:
        entropy = outputs_of(lab, lab.config.softest()).mean_entropy()
        lessons = Lessons(lab.rows, smoothed_labels(len(lab.task.tokenizer), entropy))
    else:
        lessons = Lessons(scarce(lab.rows, recipe.label_fraction))
    if not recipe.writes_itself:
        return lessons
    policy = OnPolicy(
        rows=lab.rows.take(transfer_rows(lab.rows, recipe)),
        teacher=None if recipe.rewarded else teacher_of(lab, recipe, counted),
        rewards=lab.task.rewards if recipe.rewarded else None,
        counted=counted,
        recipe=recipe,
        seed=seed,
        batch_rows=lab.config.students.training.batch_rows,
        longest=lab.task.longest_answer,
        end=lab.task.tokenizer.eos_token_id,
        vocabulary=len(lab.task.tokenizer),
    )
    return replace(lessons, on_policy=policy)
