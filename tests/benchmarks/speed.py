"""What a training step costs, in ratios of one run. About 5 minutes on an idle machine. Exit
code 1 if a ratio is above its limit.

    python -m tests.benchmarks.speed

Bare: forward, backward, clipping and AdamW on batches that are ready. Loop: `fit`, with the data,
the log, validation and checkpoints. Then the same from stored outputs. All models, rows and steps
are the same; every kind is timed in turn, `ROUNDS` times, and medians are compared.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import torch
from accelerate import Accelerator

import train
from configs.schema import Recipe
from experiment.cost import CountedForward, TrainingFlops
from experiment.experiment import (
    Experiment,
    data_of,
    loss_of,
    new_model,
    new_student,
    open_experiment,
    splits_of,
    training_set_of,
)
from experiment.reading import read_config
from experiment.run import Run
from experiment.workers import keep_freed_memory
from models.rows import batch_order, collate
from student.recipe import FROM_TEXT
from student.training_set import TrainingSet

ROOT = Path(__file__).parent.parent.parent
STEPS, ROUNDS = 900, 3  # steps: about as many as the student of configs/quickstart.yaml takes
OUTPUTS = {
    "logits": Recipe(access="logits"),
    "top 5": Recipe(access="top_k", outputs={"k": 5}),
    "12 draws": Recipe(access="sampled", outputs={"k": 12}),
    "states": Recipe(
        access="hidden",
        outputs={"layers": [2, 3]},
        objective={"forward_kl": 0.1, "hidden_mse": 0.6, "attention_kl": 0.3},
    ),
}
MOST = {"loop": 1.10, "logits": 1.25, "top 5": 1.10, "12 draws": 1.10}  # states: no limit


def main() -> int:
    torch.set_num_threads(1)  # as in each of two workers
    keep_freed_memory()  # in bare steps, too
    changes = ["task.limit=20000", "threads=1", "workers=1", "controls=[]", "verdicts=[]"]
    changes += ["checkpoint_steps=300"]  # else a training this short has none
    config = read_config(ROOT / "configs" / "quickstart.yaml", changes)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        run = Run.open(Path(folder), config, {})
        experiment = open_experiment(config, run, Accelerator(cpu=True))
        run.manifest |= {"data": data_of(experiment), "splits": splits_of(experiment)}
        teacher = new_model(experiment, config.teacher.model, 0)
        result = fit(experiment, "teacher", teacher, text(experiment), FROM_TEXT, 1)
        run.record_stage("teacher", *result)
        kinds: dict[str, Callable[[], None]] = {
            "bare": lambda: bare(experiment),
            "loop": lambda: loop(experiment, "loop", FROM_TEXT),
        }
        for name, recipe in OUTPUTS.items():
            stage = experiment.plan.request(recipe).stage
            train.produce_outputs(experiment, stage, recipe)
            kinds[name] = lambda name=name, recipe=recipe: loop(experiment, name, recipe)
        seconds: dict[str, list[float]] = {name: [] for name in kinds}
        for _ in range(ROUNDS):
            for name, once in kinds.items():
                started = time.perf_counter()
                once()
                seconds[name].append((time.perf_counter() - started) / STEPS)
        flops = TrainingFlops(student(experiment)).of_batch(mean_batch(experiment))
    median = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"{'bare step':<28} {1000 * median['bare']:7.2f} ms")
    ratios = {"loop": median["loop"] / median["bare"]}
    ratios |= {name: median[name] / median["loop"] for name in OUTPUTS}
    for name, ratio in ratios.items():
        what = "loop / bare" if name == "loop" else f"{name} / loop from text"
        print(f"{what:<28} {ratio:7.3f}   " + (f"at most {MOST[name]:.2f}" if name in MOST else ""))
    peak = matmul_peak()
    print(f"{'matrix products, peak':<28} {peak / 1e9:7.1f} GFLOP/s")
    print(f"{'bare step, share of peak':<28} {flops / median['bare'] / peak:7.3f}")
    return 1 if any(ratios[name] > most for name, most in MOST.items()) else 0


def text(experiment: Experiment) -> TrainingSet:
    """The data itself, in the order of a student."""
    return training_set_of(experiment, FROM_TEXT, 0, CountedForward)


def student(experiment: Experiment) -> torch.nn.Module:
    return new_student(experiment, FROM_TEXT, text(experiment), 0)


def fit(
    experiment: Experiment,
    stage: str,
    model: torch.nn.Module,
    data: TrainingSet,
    recipe: Recipe,
    steps: int,
):
    training = experiment.config.students.training
    loss = loss_of(experiment, recipe, training)
    return train.fit(
        experiment, stage, model, data, loss, training, steps=steps, seed=0, lineage=""
    )


def loop(experiment: Experiment, name: str, recipe: Recipe) -> None:
    """A complete training of STEPS steps, its model saved and its checkpoints removed."""
    data = training_set_of(experiment, recipe, 0, CountedForward)
    stage = f"students/{name.replace(' ', '-')}/seed-0"
    model = new_student(experiment, recipe, data, 0)
    result = fit(experiment, stage, model, data, recipe, STEPS)
    experiment.run.record_stage(stage, *result)


BATCHES: list = []


def bare(experiment: Experiment) -> None:
    """The same steps without anything around them."""
    training = experiment.config.students.training
    order = batch_order(experiment.rows.lengths, training.batch_rows, 0)
    if not BATCHES:
        BATCHES.extend(collate(experiment.rows, order(step), 0) for step in range(STEPS))
    model = student(experiment).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    for batch in BATCHES:
        logits = model(batch.input_ids, use_cache=False).logits[batch.counted]
        torch.nn.functional.cross_entropy(logits, batch.targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip_norm)
        optimizer.step()
        optimizer.zero_grad()


def mean_batch(experiment: Experiment):
    """Row lengths of a batch of the mean size."""
    order = batch_order(experiment.rows.lengths, experiment.config.students.training.batch_rows, 0)
    batches = [experiment.rows.lengths[order(step)] for step in range(STEPS)]
    mean = statistics.mean(int(lengths.max()) for lengths in batches)
    return min(batches, key=lambda lengths: abs(int(lengths.max()) - mean))


def matmul_peak(size: int = 1024, repeats: int = 20) -> float:
    """FLOP/s of square float32 products on one thread, the best of some."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


if __name__ == "__main__":
    sys.exit(main())
