"""Train a teacher, produce its outputs, and train students and their controls.

    python train.py configs/quickstart.yaml                     # about 5 minutes on 2 cores
    python train.py configs/quickstart.yaml seeds=[0,1] name=two-seeds
    python train.py configs/quickstart.yaml --tune              # choose learning rates

Rerun the same command to resume. Evaluate the run with eval.py.
"""

import math
import sys
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

from configs.command import run_command
from experiment.command import before_imports, train_parser

if __name__ == "__main__":
    before_imports(train_parser())

import psutil
import torch
from torch import nn

from configs.schema import Config, LabError, Recipe, Training
from experiment.answers import answer_prompts
from experiment.budget import check_budgets, steps_within_budget
from experiment.collecting import OpenSource, ask_teacher, check_seller, sources
from experiment.cost import CountedForward, cpu_seconds, load_of_others
from experiment.environment import environment
from experiment.experiment import (
    Experiment,
    asked_of,
    binding_of,
    data_of,
    lineage_of,
    loss_of,
    new_model,
    new_student,
    open_experiment,
    pretrained_of,
    splits_of,
    teacher_made_from,
    teacher_training_set,
    training_set_of,
)
from experiment.log import OutputsLog, print_summary
from experiment.preflight import check_experiment
from experiment.processes import (
    micro_batches,
    new_accelerator,
    require_one_way_to_share,
    require_rows_for_all,
    sum_over_processes,
)
from experiment.reading import read_config
from experiment.run import Run
from experiment.stages import (
    StageResult,
    record_stage,
    register_pretrained,
    reuse_stage,
    run_stages,
)
from experiment.training_state import TrainingState
from experiment.tuning import tune
from experiment.workers import keep_freed_memory
from models.rows import Rows
from student.hidden import student_of
from student.loss import Loss
from student.recipe import FROM_TEXT
from student.training_set import TrainingSet, without_reasoning
from teacher.outputs import finish_outputs, make_outputs, sha256_of_outputs
from teacher.shards import Outputs
from teacher.source import outside_vocabulary


def main(arguments: list[str] | None = None) -> int:
    options = train_parser().parse_intermixed_args(arguments)

    def start() -> int:
        if options.tune:
            train = partial(story, fresh=options.fresh)
            tune(options.config, options.overrides, options.runs, train)
            return 0
        config = read_config(options.config, options.overrides)
        story(config, options.runs / config.name, options.fresh)
        return 0

    return run_command(start, "rerun the same command to resume from the last checkpoint")


def story(config: Config, folder: Path, fresh: bool = False) -> None:
    """Train teachers, make outputs, train students and controls; all in the folder of a run."""
    torch.set_num_threads(config.threads or min(8, psutil.cpu_count(logical=False) or 1))
    keep_freed_memory()
    accelerator = new_accelerator(config, folder)
    require_one_way_to_share(config, accelerator)
    started = cpu_seconds()
    with Run(folder).locked() if accelerator.is_main_process else nullcontext():
        experiment = open_experiment(config, Run(folder), accelerator)
        check_experiment(experiment)
        check_budgets(experiment)
        check_seller(experiment)
        experiment = begin_run(experiment, folder)
        if config.trackers:
            accelerator.init_trackers(config.name)  # it writes into the folder of the run
        plan, run = experiment.plan, experiment.run
        before = [*run.ledger]

        for stage, seed in plan.teachers.items():
            if not fresh:
                reuse_stage(experiment, stage, teacher_made_from(experiment, seed))
        teachers = {stage: (train_teacher, seed) for stage, seed in plan.teachers.items()}
        run_stages(experiment, teachers)
        experiment = answer_prompts(experiment)

        for names in plan.training_order:
            with sources(experiment) as open_source:
                for stage, recipe in plan.requests(names).items():
                    produce_outputs(experiment, stage, recipe, open_source, fresh)
            students = {
                stage: (train_student, name, plan.recipes[name], seed)
                for stage, (name, seed) in plan.students(names).items()
            }
            run_stages(experiment, students)
        accelerator.end_training()
        if experiment.is_main:
            run.close(load_of_others(started, config.workers) if run.ledger != before else None)
            print_summary(run)


def begin_run(experiment: Experiment, folder: Path) -> Experiment:
    """Open or resume the run folder. LabError if it was started on other data."""
    accelerator, config = experiment.accelerator, experiment.config
    if experiment.is_main:
        threads, processes = torch.get_num_threads(), accelerator.num_processes
        here = environment(threads, config.workers, processes)
        experiment = replace(experiment, run=Run.open(folder, config, here))
    accelerator.wait_for_everyone()
    if not experiment.is_main:
        experiment.run.reload()
    manifest = experiment.run.manifest
    data = {"data": data_of(experiment), "splits": splits_of(experiment)}
    if "pretrained" not in manifest:
        manifest["pretrained"] = pretrained_of(experiment)
    if "overlap" not in manifest:
        manifest["overlap"] = experiment.task.overlap()
    if any(manifest.setdefault(key, found) != found for key, found in data.items()):
        raise LabError(
            f"{folder} was started on other rows or with another tokenizer; train again under "
            "another name=..."
        )
    if experiment.is_main:
        experiment.run.save()  # workers read it
    return experiment


def train_teacher(experiment: Experiment, stage: str, seed: int) -> StageResult:
    """Train the teacher, or a second one from another seed, on the task's rows; or get to know the
    one behind an endpoint."""
    settings = experiment.config.teacher
    if experiment.config.sold_elsewhere:
        return ask_teacher(experiment, stage)
    model = new_model(experiment, settings.model, seed)
    if settings.epochs == 0:
        return register_pretrained(experiment, stage, model)
    data = teacher_training_set(experiment, seed)
    result = fit(
        experiment,
        stage,
        model,
        data,
        loss_of(experiment, FROM_TEXT, settings.training),
        settings.training,
        steps=max(1, round(settings.epochs * data.order.per_epoch)),
        seed=seed,
        lineage=f"Trained on data `{experiment.task.name}` from seed {seed}.",
    )
    if result:
        result[1]["made_from"] = teacher_made_from(experiment, seed)
    return result


def produce_outputs(
    experiment: Experiment,
    stage: str,
    recipe: Recipe,
    open_source: OpenSource,
    fresh: bool = False,
) -> None:
    """Compute, or buy, and store what the teacher reveals for the transfer rows."""
    run, request = experiment.run, experiment.plan.request(recipe)
    binding = binding_of(experiment, recipe, request)
    permission = [experiment.config.teacher.api.permission] if "api" in binding else []
    made_from = "+".join(map(str, [*binding.values(), *permission]))
    if run.stage_done(stage) or (not fresh and reuse_stage(experiment, stage, made_from)):
        return
    rows, folder = request.transfer_rows or len(asked_of(experiment, recipe)), run.folder / stage
    accelerator = experiment.accelerator
    source = open_source(stage, recipe, request)
    with closing(source), OutputsLog(experiment, stage, rows, source) as log:
        make_outputs(
            folder,
            source,
            asked_of(experiment, recipe),
            request,
            binding,
            log.progress,
            accelerator.process_index,
            accelerator.num_processes,
        )
    accelerator.wait_for_everyone()
    result = None
    if experiment.is_main:
        made = finish_outputs(folder, rows)
        size = {"bytes": made.bytes, "bytes_per_token": made.bytes / max(1, made.tokens)}
        names = {"sha256": sha256_of_outputs(folder), "made_from": made_from}
        names |= {"bought": source.origin()} if source.origin() else {}
        size |= outside_vocabulary(source, lambda: Outputs(folder).rows)
        result = (
            log.watch.read(made.flops) | size | source.bill(),
            names | {"rows": rows, "different": made.different},
        )
        print(f"{stage:<34} {rows} rows, {made.bytes / 2**20:.1f} MB")
    record_stage(experiment, stage, result)


def train_student(
    experiment: Experiment, stage: str, name: str, recipe: Recipe, seed: int
) -> StageResult:
    """Train one student or control: same initial weights per seed, its own training set and loss.

    All cost the same FLOPs, outputs included: one that needs no outputs trains for more steps.
    """
    training = experiment.config.students.training
    if recipe.student.learning_rate:
        training = training.model_copy(update={"learning_rate": recipe.student.learning_rate})
    data = training_set_of(experiment, recipe, seed, CountedForward)
    model = new_student(experiment, recipe, data, seed)
    loss = loss_of(experiment, recipe, training)
    steps, max_flops = steps_within_budget(experiment, name, recipe, model, data, loss)
    validation = None
    if recipe.outputs.traces == "none":
        validation = without_reasoning(experiment.validation, experiment.task)
    return fit(
        experiment,
        stage,
        model,
        data,
        loss,
        training,
        steps=steps,
        seed=seed,
        lineage=lineage_of(experiment, name, recipe, seed),
        max_flops=max_flops,
        validation=validation,
    )


def fit(
    experiment: Experiment,
    stage: str,
    model: nn.Module,
    data: TrainingSet,
    loss: Loss,
    training: Training,
    *,
    steps: int,
    seed: int,
    lineage: str,
    max_flops: float | None = None,
    validation: Rows | None = None,
) -> StageResult:
    """The one training loop: teacher, student and control differ only in data and loss.

    Batch by step number, forward, loss, backward, clip, step, log, checkpoint; for a number of
    steps or until max_flops are spent. Several processes share every step.
    """
    accelerator, device = experiment.accelerator, experiment.accelerator.device
    prepare(model.to(device), training)
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=training.betas, weight_decay=training.weight_decay, fused=True
    )
    require_rows_for_all(stage, len(data.indices(0)), accelerator)
    state = TrainingState(
        experiment, stage, model, optimizer, steps, lineage, max_flops, validation
    )
    model.train()
    while state.progress < 1:
        step, progress = state.step, state.progress
        seed_everything(seed_of_step(seed, step), device)  # for models with dropout
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(training, state.schedule_step, steps)
        step_data = data.at(student_of(model), step, progress)
        indices = step_data.indices(step)
        normalizer = loss.normalizer(step_data.rows, indices)
        total_loss = torch.zeros((), dtype=student_of(model).dtype, device=device)
        for part in micro_batches(indices, training.accumulation, accelerator):
            part_loss = loss(model, step_data, part, normalizer, progress)
            accelerator.backward(part_loss)
            total_loss += part_loss.detach()
        total_loss = sum_over_processes(accelerator, model, total_loss)
        norm = accelerator.clip_grad_norm_(model.parameters(), training.clip_norm)
        state.require_finite(total_loss, norm, step_data.rows.ids[indices])
        optimizer.step()
        optimizer.zero_grad()
        state.advance(step_data, indices, loss.uses_hidden(progress), total_loss, norm)
    return state.finish(data)


def prepare(model: nn.Module, training: Training) -> None:
    """What makes steps smaller or faster, and leaves the names of the parameters as they are."""
    if training.activation_checkpointing:
        student_of(model).activation_checkpointing_enable()
    if training.compile:
        student_of(model).base_model.compile(dynamic=True)


def learning_rate(training: Training, step: float, steps: int) -> float:
    """Linear warm-up, then half a cosine down to final_fraction of the peak."""
    warmup = max(1, round(training.warmup_fraction * steps))
    if step < warmup:
        return training.learning_rate * min(1.0, (step + 1) / warmup)
    progress = (step - warmup) / max(1, steps - warmup)
    low = training.final_fraction
    return training.learning_rate * (low + (1 - low) * (1 + math.cos(math.pi * progress)) / 2)


def seed_of_step(seed: int, step: int) -> int:
    """All randomness of a step is a function of (seed, step), so checkpoints hold no generator
    state. torch decorrelates neighbouring seeds."""
    return (seed * 1_000_003 + step) % 2**63


def seed_everything(seed: int, device: torch.device) -> None:
    """Seed the generators of this device; torch.manual_seed seeds those of all device types, which
    takes a twentieth of a small step."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


if __name__ == "__main__":
    sys.exit(main())
