"""Train a teacher, let it produce outputs, train students and their controls on them.

    python train.py configs/quickstart.yaml                     # about 5 minutes on 2 cores
    python train.py configs/quickstart.yaml seeds=[0,1] name=two-seeds

Stopped at any moment, the same command goes on where it was. Judge the run with eval.py.
"""

import argparse
import hashlib
import math
import multiprocessing
import os
import signal as signals
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
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
from configs.runs import Run, sha256_of_model, sha256_of_tensors, write_json
from configs.schema import Config, LabError, Model, Recipe, Training, read_config
from measure.cost import CountedForward, Stopwatch, TrainingFlops
from measure.journal import Journal
from measure.provenance import environment
from student.hidden import Projected
from student.lessons import Lessons, scarce, smoothed_labels
from student.recipe import FROM_TEXT, Match, Objective, match_of, objective_of, recipes_of
from tasks import load_task
from tasks.pronounce import Pronounce
from tasks.rows import Rows, batch_order, collate, weight_of
from teacher.model import build_model, initialise, load_model, save_model, size_of
from teacher.outputs import make_outputs, name_of, outputs_binding, sha256_of_outputs
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
        for settings in (config.teacher.model, config.students.model):
            try_model(lab, settings)
        run = lab.run
        run.manifest["data"] = {"rows": lab.rows.digest(), "tokenizer": tokenizer_sha256(lab.task)}
        teachers = {"teacher": (train_teacher, config.teacher.seed)}
        if "twin" in config.controls:
            teachers["twin"] = (train_teacher, config.teacher.seed + 1)
        train_all(lab, teachers)

        recipes = recipes_of(config)
        for recipe in recipes.values():
            if recipe.access != "none":
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

    With `workers` above 1 that many processes share the threads: tiny models gain little from a
    second thread, but two of them train side by side. What a stage computes does not depend on
    when it runs, nor on its neighbours.
    """
    waiting = {stage: job for stage, job in jobs.items() if not lab.run.stage_done(stage)}
    if lab.config.workers == 1 or len(jobs) == 1:
        for stage, (function, *arguments) in waiting.items():
            close_stage(lab, stage, function(lab, stage, *arguments))
        return
    threads = max(1, torch.get_num_threads() // lab.config.workers)
    with ProcessPoolExecutor(
        lab.config.workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=start_worker,
        initargs=(lab.config, lab.run.folder, threads),
    ) as pool:
        try:
            running = {
                pool.submit(work, function, stage, *arguments): stage
                for stage, (function, *arguments) in waiting.items()
            }
            for done in as_completed(running):
                lab.run.close_stage(running[done], *done.result())
        except BrokenProcessPool:
            raise LabError(
                "a worker was killed from outside, perhaps for memory; the same command goes on, "
                "workers=1 under another name=... needs less"
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def close_stage(lab: Lab, stage: str, closing: Closing | None) -> None:
    """The main process enters a stage in the run's books; the others read them."""
    if lab.accelerator.is_main_process:
        lab.run.close_stage(stage, *closing)
    lab.accelerator.wait_for_everyone()
    if not lab.accelerator.is_main_process:
        lab.run.reload()


def start_worker(config: Config, folder: Path, threads: int) -> None:
    """A worker opens the lab once. It leaves Ctrl-C to its parent, and ends when that ends."""
    global worker_lab
    signals.signal(signals.SIGINT, signals.SIG_IGN)
    parent = multiprocessing.parent_process()
    Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    torch.set_num_threads(threads)
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
    if not lab.accelerator.is_main_process:
        return close_stage(lab, stage, None)
    watch = Stopwatch(lab.config.cost, torch.get_num_threads())
    teacher = CountedForward(load_model(lab.run.teacher))
    folder = lab.run.folder / stage
    total = recipe.transfer_rows or len(lab.rows)
    with tqdm(total=total, desc=stage, unit="row", ascii=True, leave=False, disable=None) as bar:
        flops = make_outputs(
            folder, teacher, lab.task, lab.rows, recipe, binding_of(lab, recipe), bar.update
        )
    size = sum(file.stat().st_size for file in folder.iterdir())
    made = {"sha256": sha256_of_outputs(folder), "rows": total, "bytes": size}
    close_stage(lab, stage, (watch.read(flops), made))
    tqdm.write(f"{stage:<34} {total} rows, {size / 2**20:.1f} MB")


def tokenizer_sha256(task: Pronounce) -> str:
    return hashlib.sha256(task.tokenizer.backend_tokenizer.to_str().encode("utf-8")).hexdigest()


def binding_of(lab: Lab, recipe: Recipe) -> dict[str, Any]:
    """What the outputs of a recipe must be bound to in this run."""
    return outputs_binding(
        recipe,
        teacher_sha256=lab.run.manifest["stages"]["teacher"]["sha256"],
        tokenizer_sha256=lab.run.manifest["data"]["tokenizer"],
        rows=lab.rows,
        seed=lab.config.teacher.seed,
    )


def train_student(lab: Lab, stage: str, name: str, recipe: Recipe, seed: int) -> Closing:
    """One student or control: the same starting weights per seed, other lessons and objective.

    All cost the same FLOPs, outputs included: who does not pay for outputs trains for more steps.
    """
    settings = lab.config.students
    model = new_model(lab, settings.model, seed)
    budget = settings.budget * lab.run.cost_of("teacher")["flops"]
    lineage = f"Student `{name}` from seed {seed} <- "
    if recipe.access != "none":
        budget -= lab.run.cost_of(f"outputs/{name_of(recipe)}")["flops"]
        teacher = lab.run.manifest["stages"]["teacher"]["sha256"][:16]
        lineage += f"teacher {teacher} <- "
    lessons = lessons_of(lab, recipe, seed)
    match = match_of(recipe)
    if match:
        model = Projected(model, lessons.width, seed)
    steps = affordable_steps(model, lessons.rows, settings.training, seed, budget, match)
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
    )


def lessons_of(lab: Lab, recipe: Recipe, seed: int) -> Lessons:
    """The rows that a recipe trains on, and the signal at each of their positions."""
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


def affordable_steps(
    model: nn.Module,
    rows: Rows,
    training: Training,
    seed: int,
    budget: float,
    match: Match | None = None,
) -> int:
    """How many steps on these rows fit into a budget of FLOPs."""
    order = batch_order(rows.lengths, training.batch_rows, seed)
    whole, plain = TrainingFlops(model), TrainingFlops(student_of(model))
    spent, extra = [0], [0]  # after so many steps: plain, and on top by those that look inside
    while spent[-1] <= budget:
        lengths = rows.lengths[order(len(spent) - 1)]
        spent.append(spent[-1] + plain.of_batch(lengths))
        extra.append(extra[-1] + whole.of_batch(lengths) - plain.of_batch(lengths))
    looks = match.steps if match else lambda steps: 0
    affordable = [n for n in range(len(spent)) if spent[n] + extra[looks(n)] <= budget]
    return max(affordable, default=0)


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
) -> Closing | None:
    """THE training loop: teacher, student and control differ only by what they are handed.

    Batch by step number, forward, objective, backward, clip, step, log, checkpoint. Ends with the
    saved model at <run>/<stage>; returns what the run enters in its books. Several processes share
    every step; the main one alone writes and returns.
    """
    pad = lab.task.tokenizer.pad_token_id
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
    first, flops, cost_before = restore(checkpoints, model, optimizer)
    watch = Stopwatch(lab.config.cost, torch.get_num_threads(), cost_before)
    accelerator.wait_for_everyone()  # all have read the checkpoint before one writes another
    journal = None
    if main_process:
        journal = Journal(lab.run, stage, lab.task, lab.validation, steps, first)
    saved_at = watch.elapsed()
    model.train()
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(training, step, steps)
        indices = order(step)
        # Every process takes its parts of the step; the denominators are those of the whole step.
        count = min(training.accumulation * processes, len(indices))
        own = np.array_split(indices, count)[accelerator.process_index :: processes]
        total, positions = weight_of(lessons.rows, indices, training.prompt_weight)
        progress = step / steps
        looks = match is not None and progress < match.until
        learner = model if looks else student_of(model)
        loss = torch.zeros((), dtype=student_of(model).dtype, device=device)
        for part in own:
            part = collate(lessons.rows, part, pad, training.prompt_weight)
            signal = lessons.signal(part).to(device)
            shown = learner(part.input_ids.to(device), use_cache=False)
            losses = objective(shown.logits[part.counted], signal, progress)
            part_loss = (losses * part.weights.to(device)).sum() / total
            if looks:
                misses = match(shown, part.positions, lessons.inside(part).to(device), progress)
                part_loss = part_loss + misses.sum() / positions
            accelerator.backward(part_loss)
            loss += part_loss.detach()
        if processes > 1:
            loss = sum_over_processes(accelerator, model, loss)
        if not math.isfinite(loss):
            stop_at_nonfinite(lab, stage, step, float(loss), lessons.rows.ids[indices])
        norm = accelerator.clip_grad_norm_(model.parameters(), training.clip_norm)
        optimizer.step()
        optimizer.zero_grad()

        flops += (costs if looks else plain_costs).of_batch(lessons.rows.lengths[indices])
        if journal is None:
            continue
        tokens = len(indices) * int(lessons.rows.lengths[indices].max())
        logged = journal.note(step + 1, learner, loss, norm, flops, tokens)
        # Only where a line of the log ends, so that a continued run logs what a whole one does.
        due = watch.elapsed() - saved_at > lab.config.checkpoint_seconds
        if logged and due and step + 1 < steps:
            checkpoint(checkpoints, step + 1, model, optimizer, flops, watch.read(flops))
            saved_at = watch.elapsed()
    if journal is None:
        return None
    journal.close()
    model = student_of(model)
    folder = lab.run.folder / stage
    save_model(model, lab.task.tokenizer, folder, card(stage, model, lineage, steps))
    cost = {**watch.read(flops), "steps": steps}
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


def learning_rate(training: Training, step: int, steps: int) -> float:
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
