"""Train a teacher, let it produce outputs, train students and their controls on them.

    python train.py configs/quickstart.yaml             # about 5 minutes on 2 cores
    python train.py configs/quickstart.yaml seeds=[0,1] name=two-seeds

Stopped at any moment, the same command goes on where it was. Judge the run with eval.py.
"""

import argparse
import hashlib
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from rich import box
from rich.console import Console
from rich.panel import Panel
from tqdm import tqdm

from configs.runs import (
    Run,
    load_checkpoint,
    save_checkpoint,
    sha256_of_model,
    sha256_of_tensors,
)
from configs.schema import Config, LabError, Recipe, Training, read_config
from measure.cost import CountedForward, Stopwatch, TrainingFlops
from measure.provenance import environment
from student.lessons import Lessons, scarce, smoothed_labels
from student.objectives import Objective, cross_entropy
from student.recipe import control_recipe, objective_of
from tasks import load_task
from tasks.pronounce import Pronounce
from tasks.rows import Rows, batch_order, collate
from teacher.model import build_model, initialise, load_model, save_model, size_of
from teacher.outputs import Outputs, make_outputs, name_of, outputs_binding

VALIDATIONS = 10  # times that a model meets the validation rows, for its learning curve
VALIDATION_ROWS = 1024


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
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def story(config: Config, folder: Path) -> None:
    """The whole training story: rows, teacher, outputs, students, controls."""
    threads = config.threads or min(8, torch.get_num_threads())
    torch.set_num_threads(threads)
    run = Run(folder)
    with run.locked():
        run = Run.open(folder, config, environment(threads))
        task = load_task(config.task)
        rows, validation = task.rows("train"), task.rows("validation")

        train_teacher(run, config, task, rows, validation, "teacher", config.teacher.seed)
        if "twin" in config.controls:
            train_teacher(run, config, task, rows, validation, "twin", config.teacher.seed + 1)

        main_recipe = next(iter(config.recipes.values()))
        recipes = dict(config.recipes)
        for control in config.controls:
            if control != "twin":
                recipes[control] = control_recipe(control, main_recipe)
        for recipe in recipes.values():
            if recipe.access != "none":
                produce_outputs(run, config, task, rows, recipe)

        for seed in config.seeds:
            for name, recipe in recipes.items():
                train_student(run, config, task, rows, validation, name, recipe, seed)
        run.close()
    farewell(run)


def train_teacher(
    run: Run,
    config: Config,
    task: Pronounce,
    rows: Rows,
    validation: Rows,
    name: str,
    seed: int,
) -> None:
    """The teacher, and its twin from another seed, learn the rows themselves."""
    if run.stage_done(name):
        return
    settings = config.teacher
    model = build_model(settings.model, task.tokenizer, task.longest_row)
    order = batch_order(rows.lengths, settings.training.batch_rows, seed)
    steps = max(1, round(settings.epochs * order.per_epoch))
    lineage = f"Trained on the task `{task.name}` for {steps} steps from seed {seed}."
    fit(
        run,
        config,
        task,
        stage=name,
        folder=run.folder / name,
        model=initialise(model, seed),
        lessons=Lessons(rows),
        objective=cross_entropy,
        training=settings.training,
        steps=steps,
        seed=seed,
        validation=validation,
        lineage=lineage,
    )


def produce_outputs(run: Run, config: Config, task: Pronounce, rows: Rows, recipe: Recipe) -> None:
    """What the teacher reveals for the transfer rows, computed once and kept on disk."""
    name = name_of(recipe)
    stage = f"outputs/{name}"
    if run.stage_done(stage):
        return
    watch = Stopwatch(config.cost, torch.get_num_threads())
    teacher = CountedForward(load_model(run.teacher))
    total = recipe.transfer_rows or len(rows)
    with tqdm(total=total, desc=stage, unit="row", ascii=True, leave=False) as bar:
        make_outputs(
            run.outputs(name), teacher, task, rows, recipe, binding(run, task, rows, recipe), bar.update
        )
    size = sum(file.stat().st_size for file in run.outputs(name).iterdir())
    run.close_stage(stage, watch.read(teacher.flops), {"rows": total, "bytes": size})
    say(f"{stage:<34} {total} rows, {size / 2**20:.1f} MB")


def binding(run: Run, task: Pronounce, rows: Rows, recipe: Recipe) -> dict:
    teacher = run.manifest["stages"]["teacher"]["sha256"]
    vocabulary = hashlib.sha256(task.tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    return outputs_binding(recipe, teacher, vocabulary, rows, run.config().teacher.seed)


def train_student(
    run: Run,
    config: Config,
    task: Pronounce,
    rows: Rows,
    validation: Rows,
    name: str,
    recipe: Recipe,
    seed: int,
) -> None:
    """One student or control: the same starting weights per seed, other lessons and objective.

    All have the same FLOPs, outputs included: who does not pay for outputs trains for more steps.
    """
    stage = f"students/{name}/seed-{seed}"
    if run.stage_done(stage):
        return
    model = build_model(config.students.model, task.tokenizer, task.longest_row)
    budget = config.students.budget * run.cost_of("teacher")["flops"]
    if recipe.access != "none":
        outputs = Outputs(run.outputs(name_of(recipe)), binding(run, task, rows, recipe))
        if recipe.shuffled:
            outputs.shuffle(seed)
        lessons = Lessons(outputs.rows, outputs.signal)
        budget -= run.cost_of(f"outputs/{name_of(recipe)}")["flops"]
    elif recipe.smoothed:
        softest = next(r for r in config.recipes.values() if r.access == "logits")
        entropy = Outputs(run.outputs(name_of(softest))).mean_entropy()
        lessons = Lessons(rows, smoothed_labels(len(task.tokenizer), entropy))
    else:
        lessons = Lessons(scarce(rows, recipe.label_fraction))
    training = config.students.training
    steps = affordable_steps(model, lessons.rows, training, seed, budget)
    if steps < 1:
        raise LabError(
            f"{name}: the outputs alone cost more than students.budget "
            f"({config.students.budget:g} of the teacher); raise it or lower transfer_rows"
        )
    teacher = run.manifest["stages"]["teacher"]["sha256"][:16]
    lineage = (
        f"Student `{name}` (seed {seed}, {steps} steps) <- "
        + (f"teacher {teacher} <- " if recipe.access != "none" else "")
        + f"data `{task.name}`. Recipe: {recipe.model_dump_json()}."
    )
    fit(
        run,
        config,
        task,
        stage=stage,
        folder=run.student(name, seed),
        model=initialise(model, seed),
        lessons=lessons,
        objective=objective_of(recipe),
        training=training,
        steps=steps,
        seed=seed,
        validation=validation,
        lineage=lineage,
    )


def affordable_steps(
    model: torch.nn.Module, rows: Rows, training: Training, seed: int, budget: float
) -> int:
    """How many steps on these rows fit into a budget of FLOPs."""
    order = batch_order(rows.lengths, training.batch_rows, seed)
    costs = TrainingFlops(model)
    steps, spent = 0, 0
    while True:
        spent += costs.of_batch(rows.lengths[order(steps)])
        if spent > budget:
            return steps
        steps += 1


def fit(
    run: Run,
    config: Config,
    task: Pronounce,
    *,
    stage: str,
    folder: Path,
    model: torch.nn.Module,
    lessons: Lessons,
    objective: Objective,
    training: Training,
    steps: int,
    seed: int,
    validation: Rows,
    lineage: str,
) -> None:
    """THE training loop: teacher, student and control differ by what they are handed.

    Batch by step number, forward, objective, backward, clip, step, log, checkpoint.
    """
    accelerator = Accelerator()
    counted_flops = TrainingFlops(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=training.betas, weight_decay=training.weight_decay, fused=True
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    order = batch_order(lessons.rows.lengths, training.batch_rows, seed)
    checkpoints = run.folder / "checkpoints" / stage.replace("/", "-")
    first, flops, before = restore(checkpoints, model, optimizer)
    run.forget_metrics(stage, first)
    watch = Stopwatch(config.cost, torch.get_num_threads(), before)
    saved = watch.elapsed()
    bar = tqdm(
        total=steps, initial=first, desc=stage, unit="step", ascii=True, leave=False, disable=None
    )
    running: list[torch.Tensor] = []
    tokens_seen, mark, validated = 0, watch.elapsed(), first
    model.train()
    for step in range(first, steps):
        rate = learning_rate(training, step, steps)
        for group in optimizer.param_groups:
            group["lr"] = rate

        indices = order(step)
        flops += counted_flops.of_batch(lessons.rows.lengths[indices])
        parts = [
            collate(lessons.rows, part, task.tokenizer.pad_token_id, training.prompt_weight)
            for part in np.array_split(indices, min(training.accumulation, len(indices)))
        ]
        total = sum(part.weights.sum() for part in parts)  # of the whole step, not of a part
        loss_sum = torch.zeros(())
        for part in parts:
            signal = lessons.signal(part).to(accelerator.device)
            logits = model(part.input_ids.to(accelerator.device), use_cache=False).logits
            losses = objective(logits[part.counted], signal) * part.weights.to(accelerator.device)
            accelerator.backward(losses.sum() / total)
            loss_sum += losses.detach().sum().cpu()
        norm = accelerator.clip_grad_norm_(model.parameters(), training.clip_norm)
        optimizer.step()
        optimizer.zero_grad()

        running.append(loss_sum / total)
        tokens_seen += sum(part.input_ids.numel() for part in parts)
        bar.update()
        last = step + 1 == steps
        if (step + 1) % config.log_every == 0 or last:
            loss = float(torch.stack(running).mean())
            speed = tokens_seen / (watch.elapsed() - mark)
            line = {"loss": loss, "lr": rate, "grad_norm": float(norm), "tokens_per_s": speed}
            if VALIDATIONS * (step + 1) // steps > VALIDATIONS * validated // steps:
                line["validation_nll"] = validation_nll(model, task, validation)
                validated = step + 1
            run.log(stage=stage, step=step + 1, flops=flops, **line)
            say(
                f"{stage:<34} step {step + 1:>6}/{steps:<6} loss {loss:8.4f}  lr {rate:.2e}  "
                f"{speed:>8.0f} tokens/s"
                + (f"  val {line['validation_nll']:.4f}" if "validation_nll" in line else "")
            )
            running, tokens_seen, mark = [], 0, watch.elapsed()
            if not math.isfinite(loss):
                raise LabError(f"{stage}: the loss is {loss} at step {step + 1}; lower learning_rate")
        if watch.elapsed() - saved > config.checkpoint_seconds and not last:
            checkpoint(checkpoints, step + 1, model, optimizer, flops, watch)
            saved = watch.elapsed()
    bar.close()
    model = accelerator.unwrap_model(model)
    save_model(model, task.tokenizer, folder, card(stage, model, lineage))
    run.close_stage(
        stage,
        {**watch.read(flops), "steps": steps},
        {"sha256": sha256_of_model(folder), "params": size_of(model)},
    )
    shutil.rmtree(checkpoints, ignore_errors=True)


def learning_rate(training: Training, step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to final_fraction of the peak."""
    warmup = max(1, round(training.warmup_fraction * steps))
    if step < warmup:
        return training.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    low = training.final_fraction
    return training.learning_rate * (low + (1 - low) * (1 + math.cos(math.pi * progress)) / 2)


@torch.no_grad()
def validation_nll(model: torch.nn.Module, task: Pronounce, rows: Rows) -> float:
    """Nats per answer token on the first validation rows, by hash order of their ids."""
    model.eval()
    chosen = np.argsort(rows.ids)[:VALIDATION_ROWS]
    chosen = chosen[np.argsort(rows.lengths[chosen], kind="stable")]
    total, positions = 0.0, 0
    for indices in np.array_split(chosen, max(1, len(chosen) // 256)):
        batch = collate(rows, indices, task.tokenizer.pad_token_id)
        logits = model(batch.input_ids.to(model.device), use_cache=False).logits[batch.counted]
        total += float(
            torch.nn.functional.cross_entropy(
                logits.float(), batch.targets.to(model.device), reduction="sum"
            )
        )
        positions += len(batch.targets)
    model.train()
    return total / positions


# -- checkpoints and cards ------------------------------------------------------------------------


def checkpoint(folder: Path, step: int, model, optimizer, flops: float, watch: Stopwatch) -> None:
    """Weights, both moments of AdamW and the step: the order of the data needs no more."""
    tensors = {f"model/{k}": v for k, v in model.named_parameters()}
    for key in ("exp_avg", "exp_avg_sq"):
        tensors |= {f"{key}/{k}": optimizer.state[v][key] for k, v in model.named_parameters()}
    save_checkpoint(folder, step, tensors, {"flops": flops, "cost": watch.read(flops)})


def restore(folder: Path, model, optimizer) -> tuple[int, float, dict | None]:
    """Put a checkpoint back: (step to go on from, FLOPs so far, cost so far)."""
    found = load_checkpoint(folder)
    if found is None:
        return 0, 0, None
    tensors, meta = found
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model/{name}"])
            optimizer.state[parameter] = {
                "step": torch.tensor(float(meta["step"])),
                "exp_avg": tensors[f"exp_avg/{name}"],
                "exp_avg_sq": tensors[f"exp_avg_sq/{name}"],
            }
    return meta["step"], meta["flops"], meta["cost"]


def card(stage: str, model: torch.nn.Module, lineage: str) -> str:
    """The model card: what it is and what it descends from."""
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n"
        f"# {stage}\n\n{lineage}\n\n"
        f"{model.config.model_type}, {size_of(model):,} parameters, tensors sha256 "
        f"{sha256_of_tensors(model.state_dict())[:16]}. Made by Distillation Lab.\n"
    )


def say(line: str) -> None:
    tqdm.write(line)


def farewell(run: Run) -> None:
    """Where things are, what they cost, and what to type next."""
    seconds = sum(row["seconds"] for row in run.ledger)
    text = (
        f"run        {run.folder}\nteacher    {run.teacher}\n"
        f"students   {run.folder / 'students'}\ncost       {run.folder / 'ledger.json'}"
        f" ({seconds / 60:.1f} minutes in all)\n\nnext: python eval.py {run.folder}"
    )
    Console().print(Panel(text, title="trained", box=box.ASCII, expand=False))


if __name__ == "__main__":
    sys.exit(main())
