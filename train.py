"""Train a teacher, let it produce outputs, train students and their controls on them.

    python train.py configs/quickstart.yaml                     # about 5 minutes on 2 cores
    python train.py configs/quickstart.yaml seeds=[0,1] name=two-seeds

Stopped at any moment, the same command goes on where it was. Judge the run with eval.py.
"""

import argparse
import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from rich import box
from rich.console import Console
from rich.panel import Panel
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm import tqdm

from configs.checkpoints import checkpoint, restore
from configs.reading import read_config
from configs.runs import Run, read_json, sha256_of_model, sha256_of_tensors, write_json
from configs.schema import Config, LabError, Model, Recipe, Training
from configs.workers import keep_freed_memory, side_by_side
from measure.cost import (
    CountedForward,
    Stopwatch,
    TrainingFlops,
    affordable_steps,
    expected_steps,
)
from measure.journal import Journal
from measure.provenance import environment
from student.hidden import student_of
from student.lab import (
    Lab,
    binding_of,
    goal_of,
    lessons_of,
    new_model,
    new_student,
    open_lab,
    teacher_of,
    teacher_sha256,
    teachers_task,
    tokenizer_sha256,
    try_vocabularies,
)
from student.lessons import Lessons, answers_alone
from student.recipe import (
    FROM_TEXT,
    Match,
    Objective,
    match_of,
    objective_of,
    recipes_of,
    waves_of,
)
from tasks.rows import Rows, batch_order, weight_of
from teacher.model import (
    build_model,
    load_tokenizer,
    save_model,
    size_of,
)
from teacher.outputs import (
    charged_stages,
    finish_outputs,
    make_outputs,
    name_of,
    needs_outputs,
    sha256_of_outputs,
)


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


NOTED_SECONDS = 2.0  # how often the making of outputs notes its time

# What a stage hands back for the run's books: its cost, and what it made.
Closing = tuple[dict[str, Any], dict[str, Any]]


def story(config: Config, folder: Path) -> None:
    """The whole training story: rows, teacher, outputs, students and controls."""
    threads = config.threads or min(8, psutil.cpu_count(logical=False) or 1)
    torch.set_num_threads(threads)
    keep_freed_memory()
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    if accelerator.num_processes > 1 and config.workers > 1:
        raise LabError(
            f"{accelerator.num_processes} processes were launched and workers is {config.workers}: "
            "either many processes train one model, or every worker trains one; set workers=1"
        )
    main_process = accelerator.is_main_process
    with Run(folder).locked() if main_process else nullcontext():
        lab = open_lab(config, Run(folder), accelerator)
        try_config(lab)
        if main_process:
            here = environment(threads, config.workers, accelerator.num_processes)
            lab = replace(lab, run=Run.open(folder, config, here))
        accelerator.wait_for_everyone()
        if not main_process:
            lab.run.reload()
        run = lab.run
        data = {"rows": lab.rows.digest(), "tokenizer": tokenizer_sha256(lab.task)}
        if run.manifest.setdefault("data", data) != data:
            raise LabError(
                f"{folder} was begun on other rows or with another tokenizer; train again under "
                "another name=..."
            )
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


def train_teacher(lab: Lab, stage: str, seed: int) -> Closing:
    """The teacher, or its twin from another seed, learns the task's own rows."""
    settings = lab.config.teacher
    model = new_model(lab, settings.model, seed)
    if settings.epochs == 0:
        return adopt(lab, stage, model, f"`{settings.model.pretrained}`, as it is.")
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


def adopt(lab: Lab, stage: str, model: torch.nn.Module, lineage: str) -> Closing:
    """A model that nobody trained here: saved as it is, at no cost."""
    watch, folder = Stopwatch(lab.config.cost, torch.get_num_threads()), lab.run.folder / stage
    if lab.accelerator.is_main_process:
        tokenizer = load_tokenizer(lab.config.teacher.model.pretrained)
        save_model(model, tokenizer, folder, card(stage, model, lineage, 0))
    lab.accelerator.wait_for_everyone()
    cost = {**watch.read(0), "steps": 0}
    return cost, {"sha256": sha256_of_model(folder), "params": size_of(model)}


def try_config(lab: Lab) -> None:
    """What only the task or the models can tell of a config, before a run folder is made."""
    vocabulary, words = len(lab.task.tokenizer), len(lab.rows)
    try_vocabularies(lab)
    try_model(lab, lab.config.teacher.model)
    for name, recipe in recipes_of(lab.config).items():
        try_model(lab, lab.config.model_of(recipe))
        if recipe.access == "top_k" and recipe.k > vocabulary:
            raise LabError(
                f"recipes.{name}.k: found {recipe.k}, expected at most {vocabulary}, the size of "
                "the vocabulary"
            )
        if recipe.prompts == "train" and (recipe.transfer_rows or 0) > words:
            raise LabError(
                f"recipes.{name}.transfer_rows: found {recipe.transfer_rows}, expected at most "
                f"{words}, the training words; prompts: extended has no end"
            )


def try_model(lab: Lab, settings: Model) -> None:
    """One row through a model of this shape: what cannot work is said before the long training."""
    if settings.pretrained:
        return  # it has worked before
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
            teacher_of(lab, recipe, CountedForward),
            lab.task,
            lab.rows,
            recipe,
            binding_of(lab, recipe),
            progress,
            accelerator.process_index,
            accelerator.num_processes,
            teachers_task(lab.config, lab.run, lab.task, recipe.teachers),
        )
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return close_stage(lab, stage, None)
    made = finish_outputs(folder)
    size = sum(file.stat().st_size for file in folder.glob("*.arrow"))
    cost = {**watch.read(made.flops), "bytes": size, "bytes_per_token": size / made.tokens}
    known = {"sha256": sha256_of_outputs(folder), "rows": total, "different": made.different}
    close_stage(lab, stage, (cost, known))
    tqdm.write(
        f"{stage:<34} {total} rows, {size / 2**20:.1f} MB, {size / made.tokens:.1f} bytes per token"
    )


def train_student(lab: Lab, stage: str, name: str, recipe: Recipe, seed: int) -> Closing:
    """One student or control: the same starting weights per seed, other lessons and objective.

    All cost the same FLOPs, outputs included: who does not pay for outputs trains for more steps.
    """
    settings = lab.config.students
    lineage = f"Student `{name}` from seed {seed} <- "
    if recipe.access != "none" or recipe.initial_layers:
        lineage += f"teacher {teacher_sha256(lab, recipe, seed)[:16]} <- "
    whole_budget = 1e12 * (settings.tflops or 0.0)
    if settings.budget:
        whole_budget = settings.budget * lab.run.cost_of("teacher")["flops"]
    budget = recipe.budget_share * whole_budget
    budget -= sum(lab.run.cost_of(s)["flops"] for s in charged_stages(recipe, lab.config))
    lessons, match = lessons_of(lab, recipe, seed, CountedForward), match_of(recipe)
    model = new_student(lab, recipe, lessons, seed)
    training = settings.training
    if recipe.learning_rate:
        training = training.model_copy(update={"learning_rate": recipe.learning_rate})
    lengths, batch_rows = lessons.rows.lengths, training.batch_rows
    whole, plain = TrainingFlops(model), TrainingFlops(student_of(model))
    if lessons.on_policy:
        steps, dearest = expected_steps(plain, lessons.on_policy, lengths, batch_rows, budget)
        until_spent = budget - dearest  # the last step must not overspend it
    else:
        until_spent = None
        order = batch_order(lengths, batch_rows, seed)
        looks = match.steps if match else lambda steps: 0
        steps = affordable_steps(whole, plain, lengths, order, budget, looks)
    if steps < 1:
        raise LabError(
            f"{name}: students.{'budget' if settings.budget else 'tflops'} "
            f"{settings.budget or settings.tflops:g} leaves none for training after the outputs; "
            "raise it, or lower the recipe's transfer_rows"
        )
    return fit(
        lab,
        stage,
        model,
        lessons,
        objective_of(recipe),
        training,
        steps=steps,
        seed=seed,
        lineage=f"{lineage}data `{lab.task.name}`. Recipe: `{recipe.model_dump_json()}`.",
        match=match,
        budget=until_spent,
        validation=answers_alone(lab.validation, lab.task) if recipe.traces == "none" else None,
    )


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
    validation: Rows | None = None,
) -> Closing | None:
    """THE training loop: teacher, student and control differ only by what they are handed.

    Batch by step number, forward, objective, backward, clip, step, log, checkpoint. It takes so
    many steps or, with a budget of FLOPs, about as many: until it is spent. Ends with the saved
    model at <run>/<stage>; returns what the run enters in its books. Several processes share every
    step; the main one alone writes and returns.
    """
    goal = goal_of(lab, objective, match, training)
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

    def done() -> float:
        """The share of the training that is behind us."""
        return flops / budget if budget else step / steps

    accelerator.wait_for_everyone()  # all have read the checkpoint before one writes another
    journal = None
    if main_process:
        shown = lab.validation if validation is None else validation
        told = None if budget else steps
        journal = Journal(lab.run, stage, lab.task, shown, told, step, done())
    saved_at, saved_step = watch.elapsed(), step
    model.train()
    while (progress := done()) < 1:
        seed_everything(seed_of_step(seed, step), device)  # for models with dropout
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(training, progress * steps if budget else step, steps)
        now = lessons.at(student_of(model), step, progress)
        writing += now.writing_seconds
        indices = order(step) if now is lessons else np.arange(len(now.rows))
        lengths = now.rows.lengths_of(indices)
        # Every process takes its parts of the step; the denominators are those of the whole step.
        count = min(training.accumulation * processes, len(indices))
        own = np.array_split(indices, count)[accelerator.process_index :: processes]
        whole = weight_of(now.rows, indices, training.prompt_weight)
        loss = torch.zeros((), dtype=student_of(model).dtype, device=device)
        for part in own:
            part_loss = goal.loss(model, now, part, whole, progress)
            accelerator.backward(part_loss)
            loss += part_loss.detach()
        if processes > 1:
            loss = sum_over_processes(accelerator, model, loss)
        norm = accelerator.clip_grad_norm_(model.parameters(), training.clip_norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            stop_at_nonfinite(lab, stage, step, loss, norm, now.rows.ids[indices])
        optimizer.step()
        optimizer.zero_grad()

        looks = goal.looks(progress)
        flops += now.flops + (costs if looks else plain_costs).of_batch(lengths)
        step += 1
        if journal is None:
            continue
        tokens = len(indices) * int(lengths.max())
        learner = model if looks else student_of(model)
        logged = journal.note(step, done(), learner, loss, norm, flops, tokens)
        # Only where a line of the log ends, so that a continued run logs what a whole one does.
        due = (
            watch.elapsed() - saved_at > lab.config.checkpoint_seconds
            or step - saved_step >= lab.config.checkpoint_steps
        )
        if logged and due and done() < 1:
            cost = {**watch.read(flops), "writing_seconds": writing}
            checkpoint(checkpoints, step, model, optimizer, flops, cost)
            saved_at, saved_step = watch.elapsed(), step
    if journal is None:
        return None
    journal.close()
    model = student_of(model)
    folder = lab.run.folder / stage
    save_model(model, lab.task.tokenizer, folder, card(stage, model, lineage, step))
    cost = {**watch.read(flops), "steps": step, "rows": len(lessons.rows)}
    if lessons.on_policy:
        cost["writing_seconds"] = round(writing, 3)
        cost["writing_share"] = round(writing / cost["seconds"], 3)
    return cost, {"sha256": sha256_of_model(folder), "params": size_of(model)}


def seed_of_step(seed: int, step: int) -> int:
    """All randomness of a step is a function of (seed, step): a checkpoint holds no generator.
    torch's own makes near seeds far apart."""
    return (seed * 1_000_003 + step) % 2**63


def seed_everything(seed: int, device: torch.device) -> None:
    """What torch draws on this device; torch.manual_seed asks every kind of device, which takes a
    twentieth of a small step."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


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


def stop_at_nonfinite(
    lab: Lab, stage: str, step: int, loss: Tensor, norm: Tensor, ids: np.ndarray
) -> None:
    """LabError, with the ids of the rows of that step saved; the last checkpoint stays."""
    file = lab.run.checkpoints(stage) / "nonfinite.json"
    if lab.accelerator.is_main_process:
        found = {"loss": str(float(loss)), "gradient_norm": str(float(norm))}
        write_json(file, {"stage": stage, "step": step + 1, **found, "rows": ids.tolist()})
    what = f"the norm of the gradient is {float(norm)}"
    if not math.isfinite(loss):
        what = f"the loss is {float(loss)}"
    raise LabError(
        f"{stage}: {what} at step {step + 1}; its rows are named in {file}; lower learning_rate "
        "under another name=..., the checkpoint before it is kept"
    )


def learning_rate(training: Training, step: float, steps: int) -> float:
    """Linear warm-up, then half a cosine down to final_fraction of the peak."""
    warmup = max(1, round(training.warmup_fraction * steps))
    if step < warmup:
        return training.learning_rate * min(1.0, (step + 1) / warmup)
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
    width = max(80, *(len(line) + 4 for line in text.splitlines()))  # commands stay on one line
    panel = Panel(text, title=f"trained {run.folder}", box=box.ASCII, expand=False)
    Console(width=width).print(panel)


if __name__ == "__main__":
    sys.exit(main())
