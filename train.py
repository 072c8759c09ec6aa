"""Train a teacher, let it produce outputs, train students and their controls on them.

    python train.py configs/quickstart.yaml                     # about 5 minutes on 2 cores
    python train.py configs/quickstart.yaml seeds=[0,1] name=two-seeds

Stopped at any moment, the same command goes on where it was. Judge the run with eval.py.
"""

import argparse
import hashlib
import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from rich import box
from rich.console import Console
from rich.panel import Panel
from safetensors import SafetensorError
from torch import nn
from tqdm import tqdm

from configs.checkpoints import checkpoint, restore
from configs.runs import Run, read_json, sha256_of_model, sha256_of_tensors, write_json
from configs.schema import Config, LabError, Model, Recipe, Training, read_config
from configs.workers import side_by_side
from measure.cost import (
    CountedForward,
    Stopwatch,
    TrainingFlops,
    affordable_steps,
    expected_steps,
)
from measure.journal import Journal
from measure.provenance import environment
from student.hidden import Projected
from student.lessons import Lessons, scarce, smoothed_labels
from student.on_policy import OnPolicy
from student.recipe import (
    FROM_TEXT,
    Match,
    Objective,
    match_of,
    objective_of,
    recipes_of,
    waves_of,
)
from tasks import load_task
from tasks.pronounce import Pronounce
from tasks.rows import Rows, batch_order, collate, weight_of
from teacher.model import (
    Averaged,
    build_model,
    initialise,
    load_model,
    save_model,
    size_of,
    take_layers,
)
from teacher.outputs import (
    charged_stages,
    finish_outputs,
    make_outputs,
    name_of,
    needs_outputs,
    outputs_binding,
    sha256_of_outputs,
    stage_of_teacher,
    transfer_rows,
)
from teacher.shards import Outputs


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", help="a YAML file, as in configs/")
    parser.add_argument("overrides", nargs="*", help="key=value, as in teacher.epochs=2")
    parser.add_argument("--runs", default="runs", type=Path, help="where run folders are kept")
    options = parser.parse_args(arguments)
    try:
        config = read_config(options.config, options.overrides)
        story(config, options.runs / config.name)
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, SafetensorError) as error:
        print(f"error: {error}; nothing is lost, the same command goes on", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


@dataclass(frozen=True)
class Lab:
    """What every stage works with."""

    config: Config
    run: Run
    task: Pronounce
    rows: Rows  # the training split
    validation: Rows
    accelerator: Accelerator


NOTED_SECONDS = 2.0  # how often the making of outputs notes its time
SPARE_STEPS = 4  # of a training that ends by its budget: some are dearer than others

# What a stage hands back for the run's books: its cost, and what it made.
Closing = tuple[dict[str, Any], dict[str, Any]]


def story(config: Config, folder: Path) -> None:
    """The whole training story: rows, teacher, outputs, students and controls."""
    threads = config.threads or min(8, torch.get_num_threads())
    torch.set_num_threads(threads)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    if accelerator.num_processes > 1 and config.workers > 1:
        raise LabError(
            f"{accelerator.num_processes} processes were launched and workers is {config.workers}: "
            "either many processes train one model, or every worker trains one; set workers=1"
        )
    main_process = accelerator.is_main_process
    with Run(folder).locked() if main_process else nullcontext():
        if main_process:
            here = environment(threads, config.workers, accelerator.num_processes)
            run = Run.open(folder, config, here)
        accelerator.wait_for_everyone()
        lab = open_lab(config, run if main_process else Run(folder).reload(), accelerator)
        for settings in (config.teacher.model, *map(config.model_of, recipes_of(config).values())):
            try_model(lab, settings)
        run = lab.run
        run.manifest["data"] = {"rows": lab.rows.digest(), "tokenizer": tokenizer_sha256(lab.task)}
        teachers = {"teacher": (train_teacher, config.teacher.seed)}
        if "twin" in config.controls:
            teachers["twin"] = (train_teacher, config.teacher.seed + 1)
        train_all(lab, teachers)

        for recipes in waves_of(config):
            for recipe in recipes.values():
                if needs_outputs(recipe):
                    produce_outputs(lab, recipe)
            train_all(
                lab,
                {
                    f"students/{name}/seed-{seed}": (train_student, name, recipe, seed)
                    for seed in config.seeds
                    for name, recipe in recipes.items()
                },
            )
        if main_process:
            run.close()
            farewell(run)


def train_all(lab: Lab, jobs: dict[str, tuple]) -> None:
    """Run the training stages that are not done yet: {stage: (function, *arguments)}.

    With `workers` above 1 as many processes share the threads. What a stage computes does not
    depend on when it runs, nor on its neighbours.
    """
    waiting = {stage: job for stage, job in jobs.items() if not lab.run.stage_done(stage)}
    if lab.config.workers == 1 or len(jobs) == 1:
        for stage, (function, *arguments) in waiting.items():
            close_stage(lab, stage, function(lab, stage, *arguments))
        return
    tasks = {stage: (work, function, stage, *rest) for stage, (function, *rest) in waiting.items()}
    place = (lab.config, lab.run.folder)
    for stage, closing in side_by_side(tasks, lab.config.workers, open_worker_lab, place):
        close_stage(lab, stage, closing)


def close_stage(lab: Lab, stage: str, closing: Closing | None) -> None:
    """The main process enters a stage in the run's books; the others read them."""
    if lab.accelerator.is_main_process:
        lab.run.close_stage(stage, *closing)
    lab.accelerator.wait_for_everyone()
    if not lab.accelerator.is_main_process:
        lab.run.reload()


def open_worker_lab(config: Config, folder: Path) -> None:
    """A worker opens the lab once, for all the stages it trains."""
    global worker_lab
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    worker_lab = open_lab(config, Run(folder).reload(), accelerator)


def work(function: Callable[..., Closing], stage: str, *arguments: Any) -> Closing:
    """One training stage, in a worker."""
    worker_lab.run.reload()
    return function(worker_lab, stage, *arguments)


def open_lab(config: Config, run: Run, accelerator: Accelerator) -> Lab:
    task = load_task(config.task)
    return Lab(config, run, task, task.rows("train"), task.rows("validation"), accelerator)


def train_teacher(lab: Lab, stage: str, seed: int) -> Closing:
    """The teacher, or its twin from another seed, learns the task's own rows."""
    settings = lab.config.teacher
    model = new_model(lab, settings.model, seed)
    order = batch_order(lab.rows.lengths, settings.training.batch_rows, seed)
    return fit(
        lab,
        stage,
        model,
        Lessons(lab.rows),
        objective_of(FROM_TEXT),
        settings.training,
        steps=max(1, round(settings.epochs * order.per_epoch)),
        seed=seed,
        lineage=f"Trained on data `{lab.task.name}` from seed {seed}.",
    )


def try_model(lab: Lab, settings: Model) -> None:
    """One row through a model of this shape: what cannot work is said before the long training."""
    try:
        model = build_model(settings, lab.task.tokenizer, lab.task.longest_row)
        model(torch.ones((1, 3), dtype=torch.long), use_cache=False)
    except LabError:
        raise
    except Exception as error:  # each library has its own
        raise LabError(
            f"a model of this shape cannot run: {settings.model_dump(exclude_defaults=True)} "
            f"({' '.join(str(error).split())}); choose other sizes"
        ) from None


def new_model(lab: Lab, settings: Model, seed: int) -> nn.Module:
    model = build_model(settings, lab.task.tokenizer, lab.task.longest_row)
    return initialise(model.to(getattr(torch, lab.config.precision)), seed)


def produce_outputs(lab: Lab, recipe: Recipe) -> None:
    """What the teacher reveals for the transfer rows, computed once and kept on disk."""
    stage = f"outputs/{name_of(recipe)}"
    if lab.run.stage_done(stage):
        return
    accelerator, folder = lab.accelerator, lab.run.folder / stage
    spent = lab.run.checkpoints(stage) / "cost.json"  # by a part of this stage that was interrupted
    before = read_json(spent) if spent.exists() else None
    watch = Stopwatch(lab.config.cost, torch.get_num_threads(), before)
    total = recipe.transfer_rows or len(lab.rows)
    noted = 0.0
    with tqdm(total=total, desc=stage, unit="row", ascii=True, leave=False, disable=None) as bar:

        def progress(rows: int) -> None:
            nonlocal noted
            bar.update(rows)
            if accelerator.is_main_process and watch.elapsed() - noted >= NOTED_SECONDS:
                write_json(spent, watch.read(0))
                noted = watch.elapsed()

        make_outputs(
            folder,
            teacher_of(lab, recipe),
            lab.task,
            lab.rows,
            recipe,
            binding_of(lab, recipe),
            progress,
            accelerator.process_index,
            accelerator.num_processes,
        )
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return close_stage(lab, stage, None)
    flops, tokens = finish_outputs(folder)
    size = sum(file.stat().st_size for file in folder.glob("*.arrow"))
    cost = {**watch.read(flops), "bytes": size, "bytes_per_token": size / tokens}
    close_stage(lab, stage, (cost, {"sha256": sha256_of_outputs(folder), "rows": total}))
    tqdm.write(
        f"{stage:<34} {total} rows, {size / 2**20:.1f} MB, {size / tokens:.1f} bytes per token"
    )


def teacher_of(lab: Lab, recipe: Recipe) -> CountedForward | Averaged:
    """Who teaches a recipe, its forward passes counted."""
    stages = [stage_of_teacher(name, lab.config) for name in recipe.teachers]
    models = [CountedForward(load_model(lab.run.folder / stage)) for stage in stages]
    return models[0] if len(models) == 1 else Averaged(models)


def teacher_sha256(lab: Lab, recipe: Recipe) -> str:
    stages = lab.run.manifest["stages"]
    names = [stage_of_teacher(name, lab.config) for name in recipe.teachers]
    return "+".join(stages[name]["sha256"] for name in names)


def tokenizer_sha256(task: Pronounce) -> str:
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


def train_student(lab: Lab, stage: str, name: str, recipe: Recipe, seed: int) -> Closing:
    """One student or control: the same starting weights per seed, other lessons and objective.

    All cost the same FLOPs, outputs included: who does not pay for outputs trains for more steps.
    """
    settings = lab.config.students
    model = new_model(lab, lab.config.model_of(recipe), seed)
    if recipe.initial_layers:
        taught_by = stage_of_teacher(recipe.teachers[0], lab.config)
        model = take_layers(model, load_model(lab.run.folder / taught_by), recipe.initial_layers)
    lineage = f"Student `{name}` from seed {seed} <- "
    if recipe.access != "none":
        lineage += f"teacher {teacher_sha256(lab, recipe)[:16]} <- "
    budget = recipe.budget_share * settings.budget * lab.run.cost_of("teacher")["flops"]
    budget -= sum(lab.run.cost_of(s)["flops"] for s in charged_stages(recipe, lab.config))
    lessons = lessons_of(lab, recipe, seed)
    match = match_of(recipe)
    if match:
        model = Projected(model, lessons.width, seed)
    lengths, batch_rows = lessons.rows.lengths, settings.training.batch_rows
    whole, plain = TrainingFlops(model), TrainingFlops(student_of(model))
    if lessons.on_policy:
        steps = expected_steps(plain, lessons.on_policy, lengths, batch_rows, budget)
    else:
        order = batch_order(lengths, batch_rows, seed)
        looks = match.steps if match else lambda steps: 0
        steps = affordable_steps(whole, plain, lengths, order, budget, looks)
    if steps < 1:
        raise LabError(
            f"{name}: students.budget {settings.budget:g} of the teacher's FLOPs leaves none for "
            "training after the outputs; raise it, or lower the recipe's transfer_rows"
        )
    return fit(
        lab,
        stage,
        model,
        lessons,
        objective_of(recipe),
        settings.training,
        steps=steps,
        seed=seed,
        lineage=f"{lineage}data `{lab.task.name}`. Recipe: `{recipe.model_dump_json()}`.",
        match=match,
        budget=budget if lessons.on_policy else None,
    )


def lessons_of(lab: Lab, recipe: Recipe, seed: int) -> Lessons:
    """The rows that a recipe trains on, and the signal at each of their positions."""
    if recipe.writes_itself:
        stored = lab.rows.take(transfer_rows(lab.rows, recipe))
        policy = OnPolicy(
            rows=stored,
            teacher=teacher_of(lab, recipe),
            counted=CountedForward,
            recipe=recipe,
            seed=seed,
            batch_rows=lab.config.students.training.batch_rows,
            longest=lab.task.longest_answer,
            end=lab.task.tokenizer.eos_token_id,
            vocabulary=len(lab.task.tokenizer),
        )
        if not needs_outputs(recipe):
            return Lessons(stored, on_policy=policy)
        outputs = Outputs(lab.run.folder / f"outputs/{name_of(recipe)}", binding_of(lab, recipe))
        return Lessons(outputs.rows, outputs.signal, on_policy=policy)
    if recipe.access != "none":
        stage = f"outputs/{name_of(recipe)}"
        outputs = Outputs(lab.run.folder / stage, binding_of(lab, recipe))
        if recipe.shuffled:
            outputs = outputs.shuffle(seed)
        if recipe.access == "hidden":
            return Lessons(outputs.rows, outputs.signal, outputs.inside, outputs.hidden_width)
        return Lessons(outputs.rows, outputs.signal)
    if recipe.smoothed:
        softest = next(r for r in lab.config.recipes.values() if r.access in ("logits", "hidden"))
        entropy = Outputs(lab.run.folder / f"outputs/{name_of(softest)}").mean_entropy()
        return Lessons(lab.rows, smoothed_labels(len(lab.task.tokenizer), entropy))
    return Lessons(scarce(lab.rows, recipe.label_fraction))


def student_of(model: nn.Module) -> nn.Module:
    """The model itself, without what only training needs."""
    return model.student if isinstance(model, Projected) else model


def fit(
    lab: Lab,
    stage: str,
    model: nn.Module,
    lessons: Lessons,
    objective: Objective,
    training: Training,
    *,
    steps: int,
    seed: int,
    lineage: str,
    match: Match | None = None,
    budget: float | None = None,
) -> Closing | None:
    """THE training loop: teacher, student and control differ only by what they are handed.

    Batch by step number, forward, objective, backward, clip, step, log, checkpoint. It takes so
    many steps or, with a budget of FLOPs, about as many: until it is spent. Ends with the saved
    model at <run>/<stage>; returns what the run enters in its books. Several processes share every
    step; the main one alone writes and returns.
    """
    pad, vocabulary = lab.task.tokenizer.pad_token_id, len(lab.task.tokenizer)
    accelerator, device = lab.accelerator, lab.accelerator.device
    processes, main_process = accelerator.num_processes, accelerator.is_main_process
    model.to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=training.betas, weight_decay=training.weight_decay, fused=True
    )
    order = batch_order(lessons.rows.lengths, training.batch_rows, seed)
    if len(order(0)) < processes:
        raise LabError(
            f"{stage}: a batch of {len(order(0))} rows cannot be shared by {processes} processes; "
            "launch fewer"
        )
    costs, plain_costs = TrainingFlops(model), TrainingFlops(student_of(model))
    checkpoints = lab.run.checkpoints(stage)
    step, flops, cost_before = restore(checkpoints, model, optimizer)
    watch = Stopwatch(lab.config.cost, torch.get_num_threads(), cost_before)
    writing = (cost_before or {}).get("writing_seconds", 0.0)
    if budget:  # the last steps must not overspend it
        budget *= max(0.5, 1 - SPARE_STEPS / steps)

    def done() -> float:
        """The share of the training that is behind us."""
        return flops / budget if budget else step / steps

    accelerator.wait_for_everyone()  # all have read the checkpoint before one writes another
    journal = None
    if main_process:
        journal = Journal(lab.run, stage, lab.task, lab.validation, steps, step, done())
    saved_at = watch.elapsed()
    model.train()
    while (progress := done()) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(training, progress * steps if budget else step, steps)
        started = watch.elapsed()
        now = lessons.at(student_of(model), step, progress)
        writing += watch.elapsed() - started
        indices = order(step) if now is lessons else np.arange(len(now.rows))
        # Every process takes its parts of the step; the denominators are those of the whole step.
        count = min(training.accumulation * processes, len(indices))
        own = np.array_split(indices, count)[accelerator.process_index :: processes]
        total, positions = weight_of(now.rows, indices, training.prompt_weight)
        looks = match is not None and progress < match.until
        learner = model if looks else student_of(model)
        loss = torch.zeros((), dtype=student_of(model).dtype, device=device)
        for part in own:
            part = collate(now.rows, part, pad, training.prompt_weight)
            signal = now.signal(part).to(device)
            shown = learner(part.input_ids.to(device), use_cache=False)
            losses = objective(shown.logits[part.counted][:, :vocabulary], signal, progress)
            part_loss = (losses * part.weights.to(device)).sum() / total
            if looks:
                misses = match(shown, part.positions, now.inside(part).to(device), progress)
                part_loss = part_loss + misses.sum() / positions
            accelerator.backward(part_loss)
            loss += part_loss.detach()
        if processes > 1:
            loss = sum_over_processes(accelerator, model, loss)
        if not math.isfinite(loss):
            stop_at_nonfinite(lab, stage, step, float(loss), now.rows.ids[indices])
        norm = accelerator.clip_grad_norm_(model.parameters(), training.clip_norm)
        optimizer.step()
        optimizer.zero_grad()

        lengths = now.rows.lengths[indices]
        flops += now.flops + (costs if looks else plain_costs).of_batch(lengths)
        step += 1
        if journal is None:
            continue
        tokens = len(indices) * int(lengths.max())
        logged = journal.note(step, done(), learner, loss, norm, flops, tokens)
        # Only where a line of the log ends, so that a continued run logs what a whole one does.
        due = watch.elapsed() - saved_at > lab.config.checkpoint_seconds
        if logged and due and done() < 1:
            cost = {**watch.read(flops), "writing_seconds": writing}
            checkpoint(checkpoints, step, model, optimizer, flops, cost)
            saved_at = watch.elapsed()
    if journal is None:
        return None
    journal.close()
    model = student_of(model)
    folder = lab.run.folder / stage
    save_model(model, lab.task.tokenizer, folder, card(stage, model, lineage, step))
    cost = {**watch.read(flops), "steps": step}
    if lessons.on_policy:
        cost["writing_seconds"] = round(writing, 3)  # and scoring, live
    return cost, {"sha256": sha256_of_model(folder), "params": size_of(model)}


def sum_over_processes(
    accelerator: Accelerator, model: nn.Module, loss: torch.Tensor
) -> torch.Tensor:
    """Sum gradients over all processes, in place; returns the sum of their losses."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([loss.view(1), *(gradient.view(-1) for gradient in gradients)])
    loss, *summed = accelerator.reduce(flat).split([1, *(g.numel() for g in gradients)])
    for gradient, whole in zip(gradients, summed, strict=True):
        gradient.copy_(whole.view_as(gradient))
    return loss[0]


def stop_at_nonfinite(lab: Lab, stage: str, step: int, loss: float, ids: np.ndarray) -> None:
    """LabError, with the ids of the rows of that step saved; the last checkpoint stays."""
    file = lab.run.checkpoints(stage) / "nonfinite.json"
    if lab.accelerator.is_main_process:
        write_json(
            file, {"stage": stage, "step": step + 1, "loss": str(loss), "rows": ids.tolist()}
        )
    raise LabError(
        f"{stage}: the loss is {loss} at step {step + 1}; its rows are named in {file}; lower "
        "learning_rate under another name=..., the checkpoint before it is kept"
    )


def learning_rate(training: Training, step: float, steps: int) -> float:
    """Linear warm-up, then half a cosine down to final_fraction of the peak."""
    warmup = max(1, round(training.warmup_fraction * steps))
    if step < warmup:
        return training.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    low = training.final_fraction
    return training.learning_rate * (low + (1 - low) * (1 + math.cos(math.pi * progress)) / 2)


def card(stage: str, model: nn.Module, lineage: str, steps: int) -> str:
    """The model card: what it is and what it descends from."""
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n"
        f"# {stage}\n\n{lineage}\n\n"
        f"{model.config.model_type}, {size_of(model):,} parameters, {steps} steps, tensors sha256 "
        f"{sha256_of_tensors(model.state_dict())[:16]}. Made by Distillation Lab.\n"
    )


def farewell(run: Run) -> None:
    """Where things are, what they cost, and what to type next."""
    minutes = sum(row["seconds"] for row in run.ledger) / 60
    text = (
        f"teacher    {run.teacher}\nstudents   {run.folder / 'students'}\n"
        f"cost       {run.folder / 'ledger.json'} ({minutes:.1f} minutes in all)\n\n"
        f"next: python eval.py {run.folder}"
    )
    Console().print(Panel(text, title=f"trained {run.folder}", box=box.ASCII, expand=False))


if __name__ == "__main__":
    sys.exit(main())
