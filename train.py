"""Train a teacher, let it produce outputs, train students and their controls on them.

    python train.py configs/quickstart.yaml                     # about 5 minutes on 2 cores
    python train.py configs/quickstart.yaml seeds=[0,1] name=two-seeds

Rerun the same command to resume. Evaluate the run with eval.py.
"""

import argparse
import math
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from rich import box
from rich.console import Console
from rich.panel import Panel
from torch import nn
from tqdm import tqdm

from configs.files import read_json, write_json
from configs.schema import Config, LabError, Recipe, Training
from experiment.command import run_command
from experiment.cost import (
    CountedForward,
    Stopwatch,
    TrainingFlops,
    affordable_steps,
    expected_steps,
)
from experiment.environment import environment
from experiment.experiment import (
    Experiment,
    binding_of,
    check_budgets,
    check_experiment,
    data_of,
    loss_of,
    new_model,
    new_student,
    no_budget,
    open_experiment,
    teacher_made_from,
    teacher_of,
    teacher_sha256,
    teacher_task,
    teacher_training_set,
    training_set_of,
)
from experiment.reading import read_config
from experiment.run import Run
from experiment.stages import StageResult, record_stage, reuse_stage, run_stages
from experiment.training_state import TrainingState, model_card
from experiment.workers import keep_freed_memory
from models.language import load_tokenizer, parameter_count, save_model, sha256_of_model
from models.rows import Rows
from student.hidden import student_of
from student.loss import Loss
from student.recipe import FROM_TEXT
from student.training_set import TrainingSet, without_reasoning
from teacher.access import ACCESS
from teacher.outputs import finish_outputs, make_outputs, sha256_of_outputs

RECORD_SECONDS = 2.0  # how often the time spent on outputs is recorded


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", help="a YAML file, as in configs/")
    parser.add_argument("overrides", nargs="*", help="key=value, as in teacher.epochs=2")
    parser.add_argument("--runs", default="runs", type=Path, help="where run folders are kept")
    parser.add_argument(
        "--fresh", action="store_true", help="copy no teacher or outputs from other runs"
    )
    options = parser.parse_intermixed_args(arguments)

    def start() -> int:
        config = read_config(options.config, options.overrides)
        story(config, options.runs / config.name, options.fresh)
        return 0

    return run_command(start, "rerun the same command to resume from the last checkpoint")


def story(config: Config, folder: Path, fresh: bool = False) -> None:
    """Train teachers, make outputs, train students and controls; all in the folder of a run."""
    torch.set_num_threads(config.threads or min(8, psutil.cpu_count(logical=False) or 1))
    keep_freed_memory()
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    if accelerator.num_processes > 1 and config.workers > 1:
        raise LabError(
            f"{accelerator.num_processes} processes were launched and workers is {config.workers}: "
            "either several processes train one model, or each worker trains one; set workers=1"
        )
    with Run(folder).locked() if accelerator.is_main_process else nullcontext():
        experiment = open_experiment(config, Run(folder), accelerator)
        check_experiment(experiment)
        check_budgets(experiment, TrainingFlops, CountedForward)
        experiment = begin_run(experiment, folder)
        plan, run = experiment.plan, experiment.run

        for stage, seed in plan.teachers.items():
            if not fresh:
                reuse_stage(experiment, stage, teacher_made_from(experiment, seed))
        teachers = {stage: (train_teacher, seed) for stage, seed in plan.teachers.items()}
        run_stages(experiment, teachers)

        for names in plan.training_order:
            for stage, recipe in plan.requests(names).items():
                produce_outputs(experiment, stage, recipe, fresh)
            students = {
                plan.stage(name, seed): (train_student, name, plan.recipes[name], seed)
                for seed in config.seeds
                for name in names
            }
            run_stages(experiment, students)
        if experiment.is_main:
            run.close()
            print_summary(run)


def begin_run(experiment: Experiment, folder: Path) -> Experiment:
    """Open or resume the run folder. LabError if it was begun on other data."""
    accelerator, config = experiment.accelerator, experiment.config
    if experiment.is_main:
        threads, processes = torch.get_num_threads(), accelerator.num_processes
        here = environment(threads, config.workers, processes)
        experiment = replace(experiment, run=Run.open(folder, config, here))
    accelerator.wait_for_everyone()
    if not experiment.is_main:
        experiment.run.reload()
    data = data_of(experiment)
    if experiment.run.manifest.setdefault("data", data) != data:
        raise LabError(
            f"{folder} was begun on other rows or with another tokenizer; train again under "
            "another name=..."
        )
    if experiment.is_main:
        experiment.run.save()  # workers read it
    return experiment


def train_teacher(experiment: Experiment, stage: str, seed: int) -> StageResult:
    """The teacher, or a second one from another seed, learns the task's own rows."""
    settings = experiment.config.teacher
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


def register_pretrained(experiment: Experiment, stage: str, model: nn.Module) -> StageResult:
    """Register a pretrained teacher unchanged, at no cost."""
    watch = Stopwatch(experiment.config.cost, torch.get_num_threads())
    folder, name = experiment.run.folder / stage, experiment.config.teacher.model.pretrained
    if experiment.is_main:
        card = model_card(stage, model, f"`{name}`, unchanged.", 0)
        save_model(model, load_tokenizer(name), folder, card)
    experiment.accelerator.wait_for_everyone()
    made = {"sha256": sha256_of_model(folder), "params": parameter_count(model)}
    return {**watch.read(0), "steps": 0}, made


def produce_outputs(
    experiment: Experiment, stage: str, recipe: Recipe, fresh: bool = False
) -> None:
    """What the teacher reveals for the transfer rows, computed once and stored."""
    run, request = experiment.run, experiment.plan.request(recipe)
    binding = binding_of(experiment, recipe, request)
    made_from = "+".join(map(str, binding.values()))
    if run.stage_done(stage) or (not fresh and reuse_stage(experiment, stage, made_from)):
        return
    accelerator, folder = experiment.accelerator, run.folder / stage
    spent = run.checkpoints(stage) / "cost.json"  # by an interrupted part of this stage
    before = read_json(spent) if spent.exists() else None
    watch = Stopwatch(experiment.config.cost, torch.get_num_threads(), before)
    total, recorded = request.transfer_rows or len(experiment.rows), 0.0
    with tqdm(total=total, desc=stage, unit="row", ascii=True, leave=False, disable=None) as bar:

        def progress(rows: int) -> None:
            nonlocal recorded
            bar.update(rows)
            if experiment.is_main and watch.elapsed() - recorded >= RECORD_SECONDS:
                write_json(spent, watch.read(0))
                recorded = watch.elapsed()

        make_outputs(
            folder,
            teacher_of(experiment, recipe, CountedForward),
            experiment.task,
            experiment.rows,
            request,
            binding,
            progress,
            accelerator.process_index,
            accelerator.num_processes,
            teacher_task(experiment.config, run, experiment.task, recipe.teachers),
        )
    accelerator.wait_for_everyone()
    if not experiment.is_main:
        return record_stage(experiment, stage, None)
    summary = finish_outputs(folder)
    size = sum(file.stat().st_size for file in folder.glob("*.arrow"))
    weight = size / max(1, summary.tokens)
    cost = {**watch.read(summary.flops), "bytes": size, "bytes_per_token": weight}
    made = {"sha256": sha256_of_outputs(folder), "rows": total, "different": summary.different}
    record_stage(experiment, stage, (cost, {**made, "made_from": made_from}))
    tqdm.write(f"{stage:<34} {total} rows, {size / 2**20:.1f} MB, {weight:.1f} bytes per token")


def train_student(
    experiment: Experiment, stage: str, name: str, recipe: Recipe, seed: int
) -> StageResult:
    """One student or control: the same starting weights per seed, another training set and loss.

    All cost the same FLOPs, outputs included: one that needs no outputs trains for more steps.
    """
    config, plan, run = experiment.config, experiment.plan, experiment.run
    training = config.students.training
    if recipe.student.learning_rate:
        training = training.model_copy(update={"learning_rate": recipe.student.learning_rate})
    data = training_set_of(experiment, recipe, seed, CountedForward)
    model = new_student(experiment, recipe, data, seed)
    loss = loss_of(experiment, recipe, training)

    budget = 1e12 * (config.students.tflops or 0.0)
    if config.students.budget:
        budget = config.students.budget * run.cost_of("teacher")["flops"]
    prepaid = sum(run.cost_of(before)["flops"] for before in plan.prerequisites(recipe))
    max_flops = recipe.student.budget_fraction * budget - prepaid
    until_spent = None
    flops, plain = TrainingFlops(model), TrainingFlops(student_of(model))
    lengths = data.rows.lengths
    if data.on_policy:
        batch_rows = training.batch_rows
        steps, most = expected_steps(plain, data.on_policy, lengths, batch_rows, max_flops)
        until_spent = max_flops - most  # the last step must not exceed the budget
    else:
        steps = affordable_steps(flops, plain, lengths, data.order, max_flops, loss.hidden_steps)
    if steps < 1:
        raise no_budget(config, name)

    lineage = f"Student `{name}` from seed {seed} <- "
    if ACCESS[recipe.access].teacher or recipe.student.initial_layers:
        lineage += f"teacher {teacher_sha256(experiment, recipe, seed)[:16]} <- "
    lineage += f"data `{experiment.task.name}`. Recipe: `{recipe.model_dump_json()}`."
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
        lineage=lineage,
        max_flops=until_spent,
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
    """THE training loop: teacher, student and control differ only in data and loss.

    Batch by step number, forward, loss, backward, clip, step, log, checkpoint; for a number of
    steps or until max_flops are spent. Several processes share every step.
    """
    accelerator, device = experiment.accelerator, experiment.accelerator.device
    model.to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=training.betas, weight_decay=training.weight_decay, fused=True
    )
    require_rows_for_all(stage, len(data.indices(0)), accelerator.num_processes)
    state = TrainingState(experiment, stage, model, optimizer, steps, max_flops, validation)
    model.train()
    while state.progress < 1:
        step, progress = state.step, state.progress
        seed_everything(seed_of_step(seed, step), device)  # for models with dropout
        set_learning_rate(optimizer, learning_rate(training, state.schedule_step, steps))
        step_data = data.at(student_of(model), step, progress)
        indices = step_data.indices(step)
        normalizer = loss.normalizer(step_data.rows, indices)
        total_loss = torch.zeros((), dtype=student_of(model).dtype, device=device)
        for part in micro_batches(indices, training.accumulation, accelerator):
            part_loss = loss(model, step_data, part, normalizer, progress)
            accelerator.backward(part_loss)
            total_loss += part_loss.detach()
        if accelerator.num_processes > 1:
            total_loss = sum_over_processes(accelerator, model, total_loss)
        norm = accelerator.clip_grad_norm_(model.parameters(), training.clip_norm)
        state.require_finite(total_loss, norm, step_data.rows.ids[indices])
        optimizer.step()
        optimizer.zero_grad()
        state.advance(step_data, indices, loss.uses_hidden(progress), total_loss, norm)
    return state.finish(data, lineage)


def learning_rate(training: Training, step: float, steps: int) -> float:
    """Linear warm-up, then half a cosine down to final_fraction of the peak."""
    warmup = max(1, round(training.warmup_fraction * steps))
    if step < warmup:
        return training.learning_rate * min(1.0, (step + 1) / warmup)
    progress = (step - warmup) / max(1, steps - warmup)
    low = training.final_fraction
    return training.learning_rate * (low + (1 - low) * (1 + math.cos(math.pi * progress)) / 2)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def seed_of_step(seed: int, step: int) -> int:
    """All randomness of a step is a function of (seed, step): a checkpoint holds no generator.
    torch decorrelates neighbouring seeds."""
    return (seed * 1_000_003 + step) % 2**63


def seed_everything(seed: int, device: torch.device) -> None:
    """Seed the generators of this device; torch.manual_seed seeds those of every kind of device,
    which takes a twentieth of a small step."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def micro_batches(
    indices: np.ndarray, accumulation: int, accelerator: Accelerator
) -> list[np.ndarray]:
    """The parts of a step that this process computes, of those that all processes do."""
    processes = accelerator.num_processes
    parts = np.array_split(indices, min(accumulation * processes, len(indices)))
    return parts[accelerator.process_index :: processes]


def require_rows_for_all(stage: str, rows: int, processes: int) -> None:
    if rows < processes:
        raise LabError(
            f"{stage}: a batch of {rows} rows cannot be shared by {processes} processes; launch "
            "fewer"
        )


def sum_over_processes(
    accelerator: Accelerator, model: nn.Module, loss: torch.Tensor
) -> torch.Tensor:
    """Sum gradients over all processes, in place; returns the sum of their losses."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([loss.view(1), *(gradient.view(-1) for gradient in gradients)])
    loss, *summed = accelerator.reduce(flat).split([1, *(g.numel() for g in gradients)])
    for gradient, total in zip(gradients, summed, strict=True):
        gradient.copy_(total.view_as(gradient))
    return loss[0]


def print_summary(run: Run) -> None:
    """Where things are, what they cost, and the next command."""
    minutes = sum(row["seconds"] for row in run.ledger) / 60
    text = (
        f"teacher    {run.teacher}\nstudents   {run.folder / 'students'}\n"
        f"cost       {run.folder / 'ledger.json'} ({minutes:.1f} minutes in all)\n\n"
        f"next: python eval.py {run.folder}"
    )
    width = max(80, *(len(line) + 4 for line in text.splitlines()))  # commands stay on one line
    panel = Panel(text, title=f"trained {run.folder}", box=box.ASCII, expand=False)
    Console(width=width).print(panel)


if __name__ == "__main__":
    sys.exit(main())
