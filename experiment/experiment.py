"""The experiment: what every stage of a run works with, and what a student starts from.

Training and the checks of a finished run open it in the same way, so that both use the same
training sets and weights.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from configs.schema import Config, LabError, Model, Recipe, Training
from experiment.bought import IDENTITY, open_bought
from experiment.cost import Stopwatch
from experiment.plan import Plan
from experiment.run import Run
from models.language import (
    Averaged,
    Forward,
    build_model,
    initialise,
    load_model,
    load_tokenizer,
    sha256_of_files,
    sha256_of_model,
    sha256_of_tensors,
    take_layers,
)
from models.pretrained import load_pretrained
from models.rows import Rows, batch_order
from models.trimmed import Restricted, ids_in
from models.vocabulary import first_differing_id, require_same_vocabulary
from student.hidden import WithProjections
from student.loss import Loss
from student.on_policy import OnPolicy
from student.recipe import (
    ANSWERS,
    compares_ids,
    hidden_loss_of,
    learns_from_rewards,
    objective_of,
    projects,
    uses_relations,
)
from student.training_set import TrainingSet, lowest_ids, smoothed_labels, without_reasoning
from tasks import load_task
from tasks.task import Task
from teacher.access import ACCESS
from teacher.antidistillation import ROWS, Antidistilled, gradient_of_loss
from teacher.outputs import OutputsRequest, sha256_of_outputs
from teacher.shards import Outputs
from teacher.source import LocalModel

if TYPE_CHECKING:
    from accelerate import Accelerator

Counted = Callable[[nn.Module], Forward]  # wraps a model so that its forward passes are counted

RUN_AGAIN = "move that folder elsewhere and run train.py on the config again"


@dataclass(frozen=True)
class Experiment:
    config: Config
    run: Run
    task: Task
    rows: Rows  # the training split
    validation: Rows
    accelerator: "Accelerator | None" = None  # only for training
    share: float = 1.0  # of the machine; the rest is that of other workers

    @cached_property
    def plan(self) -> Plan:
        return Plan(self.config)

    @property
    def prompts(self) -> Rows:
        """The rows whose prompts a teacher answers."""
        return self.task.prompts("train")

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes."""
        return self.accelerator is None or self.accelerator.is_main_process

    def stopwatch(self, before: dict[str, Any] | None = None) -> Stopwatch:
        """Started; before: what an interrupted part of the stage has cost."""
        return Stopwatch(self.config.cost, torch.get_num_threads(), self.share, before)


def open_experiment(
    config: Config, run: Run, accelerator: "Accelerator | None" = None
) -> Experiment:
    task = open_task(run, config)
    rows, validation = task.rows("train"), task.evaluation_rows("validation")
    return Experiment(config, run, task, rows, validation, accelerator)


def open_task(run: Run, config: Config) -> Task:
    """The task of a config, with the answers that the run's teacher gave to its evaluation
    splits."""
    task = load_task(config.task)
    adopt_answers(run, task)
    return task


# -- answers to prompts that have none -------------------------------------------------------------


def splits_to_answer(task: Task) -> list[str]:
    """The evaluation splits whose answers the teacher writes."""
    return ["validation", *task.evaluation_splits] if task.unanswered else []


def request_of_answers(split: str) -> OutputsRequest:
    return replace(OutputsRequest.of(ANSWERS), prompts=split)


def adopt_answers(run: Run, task: Task) -> None:
    """Let the task know what the teacher answered, if it has."""
    for split in splits_to_answer(task):
        stage = request_of_answers(split).stage
        if run.manifest.get("stages", {}).get(stage):
            task.adopt(split, open_outputs(run, stage).rows)


# -- models ----------------------------------------------------------------------------------------


def new_model(experiment: Experiment, settings: Model, seed: int) -> nn.Module:
    """An untrained model for the task, in the precision of the config; or a pretrained one."""
    precision = getattr(torch, experiment.config.precision)
    if settings.pretrained:
        model = load_pretrained(settings, precision)
        recorded = experiment.run.manifest.get("pretrained", {}).get(settings.pretrained)
        if recorded and sha256_of_tensors(model.state_dict()) != recorded:
            raise LabError(
                f"model.pretrained {settings.pretrained!r} has other weights than when "
                f"{experiment.run.folder} was started; restore them, or train again under another "
                "name=..."
            )
        return model
    return initialise(build_model(settings, experiment.task).to(precision), seed)


def new_student(
    experiment: Experiment, recipe: Recipe, training_set: TrainingSet, seed: int
) -> nn.Module:
    """A student before its first step: with the same weights per seed in all recipes of one shape,
    or with layers of its teacher (if that is a recipe, of its student with the same seed); with
    projections if it matches hidden states."""
    model = new_model(experiment, experiment.config.model_of(recipe), seed)
    if recipe.student.initial_layers:
        source = verified(experiment.run, experiment.plan.stage(recipe.teachers[0], seed))
        model = take_layers(model, load_model(source), recipe.student.initial_layers)
    if not hidden_loss_of(recipe):
        return model
    width = training_set.hidden_width if projects(recipe) else 0
    return WithProjections(model, width, seed, uses_relations(recipe))


def loss_of(experiment: Experiment, recipe: Recipe, training: Training) -> Loss:
    """The loss that a training minimises."""
    task = experiment.task
    return Loss(
        objective_of(recipe),
        hidden_loss_of(recipe),
        task.pad,
        task.vocabulary,
        training.prompt_weight,
        getattr(torch, training.autocast) if training.autocast else None,
    )


def verified(run: Run, stage: str) -> Path:
    """The folder of a model of the run. LabError if its weights, config or tokenizer are not those
    recorded in the manifest."""
    folder, made = run.folder / stage, run.manifest["stages"][stage]
    if sha256_of_model(folder) != made["sha256"]:
        raise LabError(
            f"{folder} is not the model that this run trained (sha256 differs); {RUN_AGAIN}"
        )
    differing = sha256_of_files(folder).items() ^ made["files"].items()
    if differing:
        raise LabError(
            f"{folder / min(differing)[0]} is not the one that this run saved (sha256 differs); "
            f"{RUN_AGAIN}"
        )
    return folder


def open_model(run: Run, stage: str) -> nn.Module:
    """A model of the run, verified."""
    model = load_model(verified(run, stage))
    return model.to("cuda") if torch.cuda.is_available() else model


def teacher_of(experiment: Experiment, recipe: Recipe, counted: Counted) -> Forward:
    """The model that teaches a recipe; of several, their mean."""
    plan, task = experiment.plan, experiment.task
    folders = [verified(experiment.run, plan.stage(name)) for name in recipe.teachers]
    if compares_ids(recipe) and task.tokenizer is not None:
        for folder in folders:
            require_tokens(load_tokenizer(folder), task, f"access {recipe.access}")
    accelerator = experiment.accelerator
    device = accelerator.device if accelerator else torch.device("cpu")
    models = [in_tokens_of(task, load_model(folder).to(device), folder) for folder in folders]
    if recipe.outputs.antidistillation:
        models = [antidistilled(experiment, recipe, models[0])]
    models = [counted(model) for model in models]
    return models[0] if len(models) == 1 else Averaged(models, task.vocabulary)


def open_teacher(run: Run, task: Task) -> nn.Module:
    """The teacher of a run, verified, in the tokens of a task."""
    return in_tokens_of(task, open_model(run, "teacher"), run.teacher)


def in_tokens_of(task: Task, model: nn.Module, folder: Path) -> nn.Module:
    """A model of a run that reads and writes the tokens of a task: if these are some of its own, it
    is restricted to them; if they are others, it stays as it is."""
    if task.tokenizer is None:
        return model
    theirs = load_tokenizer(folder)
    ids = ids_in(theirs, task.tokenizer)
    if ids is None or first_differing_id(theirs, task.tokenizer) is None:
        return model
    return Restricted(model, ids, theirs, task.tokenizer).eval()


def require_tokens(theirs: PreTrainedTokenizerBase, task: Task, what: str) -> None:
    """LabError if a teacher with this tokenizer lacks tokens of a task."""
    if ids_in(theirs, task.tokenizer) is None:
        require_same_vocabulary(theirs, task.tokenizer, what)


def antidistilled(experiment: Experiment, recipe: Recipe, teacher: nn.Module) -> Antidistilled:
    """A teacher that avoids what would teach the recipe's proxy well."""
    stage, rows = experiment.plan.stage(recipe.outputs.proxy), experiment.validation
    require_same_vocabulary(
        load_tokenizer(experiment.run.teacher), experiment.task.tokenizer, "antidistillation"
    )
    proxy = open_model(experiment.run, stage).to(teacher.device)
    sample = rows.take(np.arange(min(ROWS, len(rows))))
    with torch.enable_grad():
        gradient = gradient_of_loss(proxy, experiment.task, sample)
    return Antidistilled(teacher, proxy, gradient, recipe.outputs.antidistillation).eval()


def teacher_task(config: Config, run: Run, task: Task, names: Sequence[str] = ("teacher",)) -> Task:
    """The task with the teacher's tokenizer, which may differ only if the teacher is pretrained."""
    model = config.teacher.model
    if not model or not model.pretrained or names[0] != "teacher":
        return task
    if ids_in(load_tokenizer(run.teacher), task.tokenizer) is not None:
        return task
    changed = config.task.model_copy(update={"tokenizer": str(run.teacher)})
    return load_task(changed)


# -- outputs and training sets ---------------------------------------------------------------------


def teacher_sha256(experiment: Experiment, recipe: Recipe, seed: int | None = None) -> str:
    """The hash of a recipe's teachers; with a seed, of those that its student with that seed starts
    from."""
    stages = experiment.run.manifest["stages"]
    paired = seed if recipe.student.initial_layers else None
    names = [experiment.plan.stage(name, paired) for name in recipe.teachers]
    return "+".join(stages[name]["sha256"] for name in names)


def tokenizer_sha256(task: Task) -> str:
    """The hash of a task's tokenizer; of an empty text if it has none."""
    text = task.tokenizer.backend_tokenizer.to_str() if task.tokenizer is not None else ""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def data_of(experiment: Experiment) -> dict[str, str]:
    """The hashes of what a run learns from."""
    found = {"rows": experiment.rows.digest(), "tokenizer": tokenizer_sha256(experiment.task)}
    return found | ({"prompts": experiment.prompts.digest()} if experiment.task.unanswered else {})


def splits_of(experiment: Experiment) -> dict[str, str]:
    """The hashes of what a run is judged on."""
    task = experiment.task
    return {s: task.rows(s).digest() for s in ("validation", *task.evaluation_splits)}


def pretrained_of(experiment: Experiment) -> dict[str, str]:
    """{name: hash of the weights} of the pretrained models that a run starts from."""
    config = experiment.config
    models = [config.teacher.model, *map(config.model_of, experiment.plan.recipes.values())]
    named = {model.pretrained: model for model in models if model and model.pretrained}
    precision = getattr(torch, config.precision)
    return {
        name: sha256_of_tensors(load_pretrained(named[name], precision).state_dict())
        for name in sorted(named)
    }


def require_same_rows(run: Run, rows: dict[str, Rows]) -> None:
    """LabError if these rows are not those that the run was started with."""
    recorded = {"train": run.manifest["data"]["rows"], **run.manifest["splits"]}
    for split, found in rows.items():
        if found.digest() != recorded[split]:
            raise LabError(
                f"the {split} rows are not those that {run.folder} was started with; restore the "
                "data, or train again under another name=..."
            )


def teacher_made_from(experiment: Experiment, seed: int) -> str:
    """The hash of all that a teacher depends on: equal teachers need not be trained twice."""
    config = experiment.config
    settings = config.teacher.model_dump(mode="json", exclude={"seed", "api"})
    if config.sold_elsewhere:
        settings["api"] = config.teacher.api.model_dump(include=IDENTITY)
    made_from = {
        **experiment.run.manifest["data"],
        "task": config.task.model_dump(mode="json"),
        "teacher": settings,
        "precision": config.precision,
        "log_every": config.log_every,
        "seed": seed,
    }
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def binding_of(
    experiment: Experiment, recipe: Recipe, request: OutputsRequest, rows: Rows | None = None
) -> dict[str, Any]:
    """What the outputs of a recipe must be bound to in this run. rows: those that are answered."""
    if rows is None:
        rows = asked_of(experiment, recipe)
    api = experiment.config.teacher.api if recipe.teachers == ["teacher"] else None
    marked = api and (request.watermark or api.canaries)
    return request.binding(
        teacher_sha256=teacher_sha256(experiment, recipe),
        tokenizer_sha256=experiment.run.manifest["data"]["tokenizer"],
        rows=rows,
        seed=experiment.config.teacher.seed,
    ) | {
        **({"api": api.endpoint} if api else {}),
        **({"watermark_key": api.watermark_key} if marked else {}),
        **({"canaries": api.canaries} if api and api.canaries else {}),
        **({"proxy_sha256": proxy_sha256(experiment, request)} if request.proxy else {}),
    }


def proxy_sha256(experiment: Experiment, request: OutputsRequest) -> str:
    return experiment.run.manifest["stages"][experiment.plan.stage(request.proxy)]["sha256"]


def outputs_of(experiment: Experiment, recipe: Recipe) -> Outputs:
    request = experiment.plan.request(recipe)
    verified_outputs(experiment.run, request.stage)
    folder = experiment.run.folder / request.stage
    return Outputs(folder, binding_of(experiment, recipe, request))


def source_of(
    experiment: Experiment, recipe: Recipe, request: OutputsRequest, counted: Counted
) -> LocalModel:
    """The source of a recipe's outputs."""
    config, run, task = experiment.config, experiment.run, experiment.task
    own_task = teacher_task(config, run, task, recipe.teachers)
    teacher = teacher_of(experiment, recipe, counted)
    return LocalModel(teacher, task, request.layers, request.relations, own_task)


def open_outputs(run: Run, stage: str) -> Outputs:
    """Outputs of the run, verified."""
    verified_outputs(run, stage)
    return Outputs(run.folder / stage)


def verified_outputs(run: Run, stage: str) -> None:
    """LabError if the outputs are not those in the manifest."""
    if sha256_of_outputs(run.folder / stage) != run.manifest["stages"][stage]["sha256"]:
        raise LabError(
            f"{run.folder / stage} does not hold the outputs that this run made (sha256 differs); "
            f"{RUN_AGAIN}"
        )


def verify_stage(run: Run, stage: str) -> None:
    """LabError if what a stage made, a model or outputs, is not what the manifest records."""
    if stage.startswith("outputs/"):
        open_outputs(run, stage)
    elif stage == "teacher" and run.config().sold_elsewhere:
        open_bought(run)
    else:
        verified(run, stage)


def lineage_of(experiment: Experiment, name: str, recipe: Recipe, seed: int) -> str:
    """What a student was trained from, for its model card."""
    parts = [f"Student `{name}` from seed {seed}"]
    if ACCESS[recipe.access].teacher or recipe.student.initial_layers:
        parts.append(f"teacher {teacher_sha256(experiment, recipe, seed)[:16]}")
    parts.append(f"data `{experiment.task.name}`. Recipe: `{recipe.model_dump_json()}`.")
    return " <- ".join(parts) + terms_of(experiment) + bought_on(experiment, recipe)


def terms_of(experiment: Experiment) -> str:
    """For the model card: the licence of a pretrained teacher, as stated."""
    published = experiment.config.teacher.published
    if not published:
        return ""
    allowed = f"Allowed by: {published.permission}. " if published.permission else ""
    return (
        f"\n\nThe licence of its teacher: {published.licence} ({published.source}); allows "
        f"distillation: {published.allows_distillation}. {allowed}"
    ).rstrip()


def bought_on(experiment: Experiment, recipe: Recipe) -> str:
    """For the model card: the terms on which a recipe's outputs were bought."""
    request = experiment.plan.request(recipe)
    stages = experiment.run.manifest["stages"]
    bought = stages.get(request.stage, {}).get("bought") if request else None
    if not bought:
        return ""
    allowed = f"Allowed by: {bought['permission']}. " if bought["permission"] else ""
    return (
        f"\n\nIts teacher's answers were bought from {bought['url'] or 'the server of this run'}, "
        f"model `{bought['model']}`, terms version {bought['terms']}, which allow distillation: "
        f"{bought['allows_distillation']}. {allowed}"
    ).rstrip()


def teacher_training_set(experiment: Experiment, seed: int) -> TrainingSet:
    """The task's rows, in the order given by a seed."""
    rows, batch_rows = experiment.rows, experiment.config.teacher.training.batch_rows
    return TrainingSet(rows, order=batch_order(rows.lengths, batch_rows, seed))


def training_set_of(
    experiment: Experiment, recipe: Recipe, seed: int, counted: Counted
) -> TrainingSet:
    """The rows that a recipe trains on, the signal at each of their positions, and their order."""
    data = stored_training_set(experiment, recipe, seed)
    batch_rows = experiment.config.students.training.batch_rows
    data = replace(data, order=batch_order(data.rows.lengths, batch_rows, seed))
    if not recipe.writes_itself:
        return data
    task, rewarded = experiment.task, learns_from_rewards(recipe)
    policy = OnPolicy(
        rows=asked_rows(experiment, recipe),
        teacher=None if rewarded else teacher_of(experiment, recipe, counted),
        rewards=task.rewards if rewarded else None,
        counted=counted,
        recipe=recipe,
        seed=seed,
        batch_rows=batch_rows,
        longest=task.longest_answer,
        end=task.end,
        vocabulary=task.vocabulary,
    )
    return replace(data, on_policy=policy)


def asked_of(experiment: Experiment, recipe: Recipe) -> Rows:
    """The rows that a teacher scores, or whose prompts it answers."""
    return experiment.rows if recipe.sequences == "data" else experiment.prompts


def asked_rows(experiment: Experiment, recipe: Recipe) -> Rows:
    """The rows of the data whose prompts are answered for a recipe, or by its student."""
    return experiment.prompts.take(OutputsRequest.of(recipe).indices(experiment.prompts))


def stored_training_set(experiment: Experiment, recipe: Recipe, seed: int) -> TrainingSet:
    """The training set that exists before training: outputs of the teacher, or rows of the data."""
    task, rows, control = experiment.task, experiment.rows, recipe.control
    request = experiment.plan.request(recipe)
    if request:
        outputs = outputs_of(experiment, recipe)
        if control.shuffled:
            outputs = outputs.shuffled(seed)
        if recipe.outputs.traces == "right":
            outputs = right_ones(outputs, task, request)
        if recipe.outputs.traces == "none":
            return TrainingSet(without_reasoning(outputs.rows, task))
        if request.layers:
            width = outputs.width
            return TrainingSet(outputs.rows, outputs.signal, outputs.hidden, width)
        return TrainingSet(outputs.rows, outputs.signal)
    if recipe.sequences == "student":
        return TrainingSet(asked_rows(experiment, recipe))
    if control.smoothed:
        entropy = outputs_of(experiment, experiment.plan.softest).mean_entropy()
        return TrainingSet(rows, smoothed_labels(task.vocabulary, entropy))
    if control.gold:
        return TrainingSet(asked_rows(experiment, recipe))
    return TrainingSet(lowest_ids(rows, control.label_fraction))


def right_ones(outputs: Outputs, task: Task, request: OutputsRequest) -> Outputs:
    """Rejection sampling: the rows that end with the right answer."""
    right = [i for i in range(len(outputs.rows)) if task.is_right(outputs.rows, i)]
    if not right:
        raise LabError(
            f"{request.stage}: no row ends with the right answer, so outputs.traces: right leaves "
            "nothing to learn from; use a better teacher or more outputs.transfer_rows"
        )
    return outputs.keep(np.asarray(right, int))
