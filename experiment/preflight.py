"""Checks that need the task or the models loaded, before a run folder is made."""

import math
from types import SimpleNamespace

from configs.files import say
from configs.schema import Config, LabError, Model, Recipe
from experiment.experiment import Experiment, new_model
from measure.metrics import metrics_of
from models.language import ModelTask
from models.pretrained import pretrained_layers, tokenizer_of
from models.probe import probe
from models.trimmed import ids_in
from models.vocabulary import first_differing_id, require_same_vocabulary
from student.recipe import compares_ids
from tasks.task import Task
from teacher.access import ACCESS


def check_experiment(experiment: Experiment) -> None:
    """LabError if the config does not fit the task's data or the models."""
    task, available = experiment.task, len(experiment.prompts)
    check_answers(experiment)
    check_vocabularies(experiment)
    check_models(experiment)
    if experiment.is_main:
        note_unknown_terms(experiment.config)
    for name, recipe in experiment.plan.recipes.items():
        check_layers(experiment, name, recipe)
        outputs = recipe.outputs
        if ACCESS[recipe.access].uses_k and outputs.k > task.vocabulary:
            raise LabError(
                f"recipes.{name}.outputs.k: found {outputs.k}, expected at most {task.vocabulary}, "
                "the size of the vocabulary"
            )
        if outputs.prompts == "train" and (outputs.transfer_rows or 0) > available:
            raise LabError(
                f"recipes.{name}.outputs.transfer_rows: found {outputs.transfer_rows}, expected at "
                f"most {available}, the training {task.item_noun}; with prompts: extended there is "
                "no limit"
            )


def check_answers(experiment: Experiment) -> None:
    """Where the data has no answers, a teacher that needs no training writes them, and models that
    learn without it need other text."""
    config, task = experiment.config, experiment.task
    if not task.unanswered:
        return
    if config.teacher.epochs > 0 or config.sold_elsewhere:
        raise LabError(
            f"task {task.name}: the prompts have no answers, so the teacher must be pretrained and "
            "on this machine; set teacher.model.pretrained and epochs 0"
        )
    for name, recipe in experiment.plan.recipes.items():
        from_data = recipe.sequences == "data"
        if recipe.control.gold or (from_data and experiment.rows is experiment.prompts):
            raise LabError(
                f"{name} learns from the data's own answers, but the prompts have none; remove it"
                + ("" if recipe.control.gold else ", or name text to learn from in task.documents")
            )


def check_models(experiment: Experiment) -> None:
    """Every kind of model is probed once, teacher and students alike. A student that is larger than
    its teacher is no mistake, but is noted."""
    config, sizes = experiment.config, {}
    models = {
        config.model_of(recipe).model_dump_json(): f"students of recipe {name}"
        for name, recipe in reversed(experiment.plan.recipes.items())
    }
    if config.teacher.model:
        models |= {config.teacher.model.model_dump_json(): "teacher"}
    for shape, what in models.items():
        settings = Model.model_validate_json(shape)
        try:
            model = new_model(experiment, settings, 0)
        except LabError as error:
            raise LabError(f"{what}: {error}") from None
        learns = what != "teacher" or config.teacher.epochs > 0
        probe(model, task_with_tokenizer_of(experiment.task, settings), what, learns)
        section = "teacher" if what == "teacher" else "students"
        again = getattr(config, section).training.activation_checkpointing
        if learns and again and not getattr(model, "supports_gradient_checkpointing", False):
            raise LabError(
                f"{section}.training.activation_checkpointing: {model.config.model_type} does not "
                "support it; remove it"
            )
        sizes[what] = sum(parameter.numel() for parameter in model.parameters())
    for what, size in sizes.items():
        if size > sizes.get("teacher", math.inf) and experiment.is_main:
            say(f"note: {what} have {size:,} parameters, more than the teacher's "
                f"{sizes['teacher']:,}")  # fmt: skip


def note_unknown_terms(config: Config) -> None:
    """Say that nobody stated whether a pretrained teacher may be imitated."""
    model, published = config.teacher.model, config.teacher.published
    unknown = published is None or published.allows_distillation == "unknown"
    if model and model.pretrained and config.teacher.epochs == 0 and unknown:
        say(
            f"note: it is not stated whether the terms of {model.pretrained} allow that a model is "
            "trained on its outputs; state it in teacher.published"
        )


def task_with_tokenizer_of(task: Task, settings: Model) -> ModelTask:
    """What a model is probed for: a pretrained one reads the tokens of its own tokenizer."""
    if not settings.pretrained:
        return task
    theirs = tokenizer_of(settings)
    return SimpleNamespace(
        name=task.name,
        tokenizer=theirs,
        vocabulary=len(theirs),
        longest_row=task.longest_row,
        pad=-1 if theirs.pad_token_id is None else theirs.pad_token_id,
    )


def check_layers(experiment: Experiment, name: str, recipe: Recipe) -> None:
    """The teacher layers that a recipe names exist, one per student layer."""
    config = experiment.config
    model, taught_by = config.model_of(recipe), config.teacher_model_of(recipe)
    named = {
        "outputs.layers": recipe.outputs.layers,
        "student.initial_layers": recipe.student.initial_layers,
    }
    for key, layers in named.items():
        if not layers:
            continue
        if experiment.task.tokenizer is None:
            raise LabError(f"recipes.{name}.{key}: a classifier reveals no layers; remove it")
        shallow, deep = (
            pretrained_layers(m) if m.pretrained else m.num_hidden_layers
            for m in (model, taught_by)
        )
        if len(layers) != shallow or not all(1 <= n <= deep for n in layers):
            raise LabError(
                f"recipes.{name}.{key} {layers}: expected {shallow} layers, one for each of the "
                f"student's, from 1 to the teacher's {deep}"
            )


def check_vocabularies(experiment: Experiment) -> None:
    """Pretrained models have the vocabulary that they need. A student must have that of the task; a
    teacher may have another one if no token ids are compared."""
    config, task = experiment.config, experiment.task
    models = {"students.model": config.students.model}
    models |= {
        f"recipes.{name}.student.model": recipe.student.model
        for name, recipe in config.recipes.items()
        if recipe.student.model
    }
    for key, model in models.items():
        if not model.pretrained:
            continue
        tokenizer = tokenizer_of(model)
        if first_differing_id(tokenizer, task.tokenizer) is not None:
            raise LabError(
                f"{key}.pretrained {model.pretrained!r} has another tokenizer than task "
                f"{task.name}; a student must use its task's tokenizer"
            )
    if not config.teacher.model or not config.teacher.model.pretrained:
        return
    theirs = tokenizer_of(config.teacher.model)
    if first_differing_id(theirs, task.tokenizer) is None:
        return
    if ids_in(theirs, task.tokenizer) is not None and config.teacher.epochs == 0:
        return
    if "tokenizer" not in type(task).Settings.model_fields or config.teacher.epochs > 0:
        require_same_vocabulary(
            theirs,
            task.tokenizer,
            "teacher.model.pretrained",
            "the teacher unchanged (epochs 0), on a task with a setting `tokenizer`",
        )
    for recipe in config.recipes.values():
        reads = recipe.sequences != "teacher" or recipe.writes_itself
        if ACCESS[recipe.access].teacher and (compares_ids(recipe) or reads):
            require_same_vocabulary(theirs, task.tokenizer, f"access {recipe.access}")
    metrics = metrics_of(task)
    for claim in config.claims():
        if metrics[claim.metric].positions:
            raise LabError(
                f"verdict {claim.claim!r}: {claim.metric} compares token by token, and the teacher "
                "has another tokenizer than its students; choose another metric"
            )
