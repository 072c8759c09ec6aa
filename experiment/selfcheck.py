"""Check a finished run for silent errors of distillation code.

Nothing is trained; every finding comes from the run's own files and models.
"""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from configs.schema import Recipe
from experiment.cost import CountedForward
from experiment.experiment import (
    Experiment,
    loss_of,
    new_student,
    open_teacher,
    outputs_of,
    teacher_of,
    teacher_task,
    training_set_of,
)
from experiment.reference import read_result
from measure.evaluate import TeacherReference
from measure.metrics import AGREEMENT, DIVERGENCE, REVERSE, TOP1
from measure.report.tables import models_in
from models.language import logits_at
from models.rows import collate
from models.states import states_of, states_options
from models.trimmed import Restricted
from student.hidden import student_of
from teacher.access import ACCESS
from teacher.shards import Outputs
from teacher.signal import HiddenSignal, finite
from teacher.source import LocalModel

ROWS = 256  # per finding
STORED = 2e-2  # nats that a stored log-probability may be off; float16 is off by 2^-11 of it
STORED_IN_HALF = 0.5  # the same for a teacher in half precision, whose logits depend on the batch
BATCH_FREE = 1e-3  # relative error of a float32 gradient summed in another order
FIRST_LOSS = 1e-3  # relative error of a loss
LEARNED = 0.05  # sequence agreement below which no model learned enough for a comparison

Finding = tuple[bool | None, str]  # passed, failed, or None: nothing to check


def selfcheck_run(experiment: Experiment) -> int:
    """Print [OK], [FAIL] or [--] for every finding; 1 if any failed, else 0."""
    started, failures = time.perf_counter(), 0
    for passed, line in selfcheck(experiment, read_result(experiment.run.folder)):
        mark = "[--]" if passed is None else "[OK]" if passed else "[FAIL]"
        print(f"{mark:<6} {line}", flush=True)
        failures += passed is False
    outcome = f"{failures} checks failed" if failures else "all checks passed"
    print(f"{outcome} ({time.perf_counter() - started:.0f} s)")
    return 1 if failures else 0


def selfcheck(experiment: Experiment, result: dict[str, Any]) -> Iterator[Finding]:
    """All findings, one after the other. `result` is eval.json."""
    yield teacher_is_its_own_student(experiment)
    for stage, recipe in experiment.plan.requests().items():
        outputs = outputs_of(experiment, recipe)
        yield stored_outputs_equal_live_ones(experiment, stage, recipe, outputs)
        yield outputs_follow_their_row(stage, outputs)
    yield gradients_are_sums(experiment)
    yield shuffled_does_not_help(result)
    for name, recipe in experiment.plan.recipes.items():
        yield first_losses(experiment, name, recipe)


def teacher_is_its_own_student(experiment: Experiment) -> Finding:
    if experiment.config.sold_elsewhere:
        return None, "the teacher as its own student: its weights are unknown"
    if teacher_task(experiment.config, experiment.run, experiment.task) is not experiment.task:
        return None, "the teacher as its own student: it has another tokenizer than its students"
    teacher = open_teacher(experiment.run, experiment.task)
    rows = experiment.validation.take(np.arange(min(ROWS, len(experiment.validation))))
    reference = TeacherReference(teacher, experiment.task, rows)
    fidelity = reference.metrics([reference.evaluate(teacher)])["fidelity"]
    worst = abs(fidelity[DIVERGENCE].mean), abs(fidelity[REVERSE].mean)
    agree = fidelity[AGREEMENT].mean, fidelity[TOP1].mean
    passed = max(worst) < 1e-6 and min(agree) == 1
    return passed, f"the teacher as its own student: KL {max(worst):.1g}, agreement {min(agree):g}"


def evenly_spaced(rows: int, count: int = ROWS) -> np.ndarray:
    """At most `count` indices of rows."""
    return np.unique(np.linspace(0, rows - 1, min(count, rows)).astype(int))


@torch.no_grad()
def stored_outputs_equal_live_ones(
    experiment: Experiment, stage: str, recipe: Recipe, outputs: Outputs
) -> Finding:
    """The teacher scores the stored rows again."""
    if experiment.config.sold_elsewhere:
        return None, f"{stage}: bought from {experiment.config.teacher.api.url}, not asked again"
    teacher, task = teacher_of(experiment, recipe, CountedForward), experiment.task
    own_task = teacher_task(experiment.config, experiment.run, task, recipe.teachers)
    access, request = ACCESS[recipe.access], experiment.plan.request(recipe)
    if not access.probabilities or own_task is not task:
        return text_is_the_teachers(experiment, stage, recipe, outputs)
    if isinstance(getattr(teacher, "model", None), Restricted) and recipe.sequences == "teacher":
        return None, f"{stage}: written with the teacher's whole vocabulary, of which some is kept"
    batch = collate(outputs.rows, evenly_spaced(len(outputs.rows)), task.pad)
    options = {"use_cache": False} | states_options(request.layers, request.relations)
    output = teacher(batch.input_ids, **options)
    live = finite(torch.log_softmax(logits_at(output, batch, task.vocabulary), -1))
    pairs = access.compare(outputs.signal(batch), live, request.k)
    if request.layers:
        stored = outputs.hidden(batch)
        states, maps = states_of(output, request.layers, request.relations)
        states = outputs.standardise(states[batch.positions])
        hidden = HiddenSignal.of_maps(states, maps[batch.positions])
        pairs["standard deviations of the states"] = hidden.states, stored.states
        pairs["of the attention"] = hidden.attention, stored.attention
        if request.relations:
            pairs["of the value relations"] = hidden.relations, stored.relations
    found = {}
    for unit, (now, then) in pairs.items():
        error = (now - then.to(now.dtype)).abs() - 2.0**-10 * now.abs()  # float16 is rounded
        found[unit] = max(float(error.max()), 0.0)
    listed = ", ".join(f"{error:.1g} {unit}" for unit, error in found.items())
    model = experiment.config.teacher.model
    half = recipe.teachers == ["teacher"] and model is not None and model.dtype is not None
    passed = max(found.values()) < (STORED_IN_HALF if half else STORED)
    return passed, f"{stage}: differs from the live teacher by at most {listed}"


def text_is_the_teachers(
    experiment: Experiment, stage: str, recipe: Recipe, outputs: Outputs
) -> Finding:
    """The teacher writes its greedy answers again."""
    if recipe.outputs.temperature > 0:
        return None, f"{stage}: sampled text, which cannot be reproduced"
    own_task = teacher_task(experiment.config, experiment.run, experiment.task, recipe.teachers)
    teacher = teacher_of(experiment, recipe, CountedForward)
    stored = outputs.rows.take(evenly_spaced(len(outputs.rows), 32))
    source = LocalModel(teacher, experiment.task, own_task=own_task)
    again = source.answer(stored, 0.0, False, torch.Generator())
    same = sum(row.tokens.tolist() == stored.row(row.index).tolist() for row in again)
    return same == len(stored), f"{stage}: {same} of {len(stored)} answers equal when rewritten"


def outputs_follow_their_row(stage: str, original: Outputs) -> Finding:
    """Rows keep their outputs in any order, and get another row's in the control `shuffled`."""
    shuffled = original.shuffled(0)
    indices = evenly_spaced(len(original.rows))
    order = np.random.Generator(np.random.PCG64(0)).permutation(indices)
    there, here = revealed_by_row(original, indices), revealed_by_row(original, order)
    kept = all(equal(here[i], there[i]) for i in indices)
    indices = evenly_spaced(len(shuffled.rows))
    moved = revealed_by_row(shuffled, indices)
    sources = revealed_by_row(original, np.unique(shuffled.source[indices]))
    arrived = all(equal(moved[i], sources[shuffled.source[i]]) for i in indices)
    same_prompt = original.rows.ids[shuffled.source[indices]] == shuffled.rows.ids[indices]
    different = int((~same_prompt).sum())  # a prompt may have been invented twice
    passed = kept and arrived and different >= 0.9 * len(indices)
    return passed, (
        f"{stage}: {len(order)} rows keep their outputs in another order; shuffled, {different} of "
        f"{len(indices)} have those of another row"
    )


def revealed_by_row(outputs: Outputs, indices: np.ndarray) -> dict[int, list[torch.Tensor]]:
    """What was revealed for each row, read in one batch."""
    batch = collate(outputs.rows, indices, 0)
    signal = outputs.signal(batch)
    sizes = batch.counted.sum(1).tolist()
    parts = [signal.targets.split(sizes)]
    for tensor in (signal.log_probs, signal.indices, signal.weights, signal.tail):
        if tensor is not None:
            parts.append(tensor.split(sizes))
    return {int(index): [part[i] for part in parts] for i, index in enumerate(indices)}


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    """Equality except for the padding of a batch; the first tensor is the complete text."""
    if a[0].shape != b[0].shape:
        return False
    width = [min(x.shape[-1], y.shape[-1]) for x, y in zip(a, b, strict=True)]
    pairs = zip(a, b, width, strict=True)
    return all(torch.equal(x[..., :w], y[..., :w]) for x, y, w in pairs)


def gradients_are_sums(experiment: Experiment) -> Finding:
    """A batch has the same gradient at once, in five micro-batches of different sizes, and row by
    row."""
    recipe, seed = next(iter(experiment.plan.recipes.values())), experiment.config.seeds[0]
    if recipe.sequences == "student":
        return None, "gradients: students of the first recipe write their own text"
    data = training_set_of(experiment, recipe, seed, CountedForward)
    model = new_student(experiment, recipe, data, seed).eval()  # no dropout
    loss = loss_of(experiment, recipe, experiment.config.students.training)
    indices = evenly_spaced(len(data.rows), 32)
    normalizer, found = loss.normalizer(data.rows, indices), []
    counts = 1, min(5, len(indices)), len(indices)
    for count in counts:
        model.zero_grad()
        for part in np.array_split(indices, count):
            loss(model, data, part, normalizer).backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found.append(torch.cat(gradients))
    error = max(float((g - found[0]).norm() / found[0].norm()) for g in found[1:])
    return error < BATCH_FREE, f"gradients: differ by {error:.1g} between {counts} micro-batches"


def shuffled_does_not_help(result: dict[str, Any]) -> Finding:
    """The control is less faithful than the student it controls, and than models trained without a
    teacher."""
    models = models_in(result)
    if "shuffled" not in models:
        return None, "shuffled: this config has no such control"
    agreement = {
        name: models[name]["fidelity"][AGREEMENT]
        for name in (next(iter(result["students"])), "low_data", "baseline")
        if name in models
    }
    shuffled = models["shuffled"]["fidelity"][AGREEMENT]
    line = (
        f"shuffled: {100 * shuffled['mean']:.1f} % of the teacher's answers, against "
        + ", ".join(f"{100 * found['mean']:.1f} % of {name}" for name, found in agreement.items())
    )
    if max(found["mean"] for found in (shuffled, *agreement.values())) < LEARNED:
        return None, f"{line}: no model learned enough for a comparison"
    if all(shuffled["ci95"][1] < found["ci95"][0] for found in agreement.values()):
        return True, line
    if all(shuffled["mean"] < found["mean"] / 2 for found in agreement.values()):
        return None, f"{line}: lower, but the intervals overlap; more held-out rows would decide it"
    return False, line


@torch.no_grad()
def is_random(model: torch.nn.Module) -> bool:
    """Whether two passes of a model in training differ."""
    ids = torch.zeros((1, 8), dtype=torch.long, device=model.device)
    model.train()
    return not torch.equal(*(model(ids, use_cache=False).logits for _ in range(2)))


def first_losses(experiment: Experiment, name: str, recipe: Recipe) -> Finding:
    """The loss logged after the first step of every student, against the loss of its untrained
    model on the rows of that step, row by row."""
    stages = {experiment.plan.stage(name, seed): seed for seed in experiment.plan.seeds_of(name)}
    logged = {
        line["stage"]: line["loss"]
        for line in experiment.run.metrics()
        if line["stage"] in stages and line["step"] == 1
    }
    loss = loss_of(experiment, recipe, experiment.config.students.training)
    data, worst, values = None, -1.0, ""
    for stage, seed in stages.items():
        data = training_set_of(experiment, recipe, seed, CountedForward)
        model = new_student(experiment, recipe, data, seed)
        if is_random(student_of(model)):
            return None, f"{name}: first loss: it has dropout, so the loss is random"
        model.eval()
        step_data = data.at(student_of(model), 0, 0.0)
        indices = step_data.indices(0)
        normalizer = loss.normalizer(step_data.rows, indices)
        with torch.no_grad():
            expected = sum(
                float(loss(model, step_data, part, normalizer))
                for part in np.array_split(indices, len(indices))
            )
        error = abs(logged[stage] - expected) / max(abs(expected), 1e-3)
        if not error < worst:  # nan is the worst
            worst, values = error, f"{logged[stage]:.5f}, expected {expected:.5f}"
    seeds = f", the worst of {len(stages)} seeds" if len(stages) > 1 else ""
    return worst < FIRST_LOSS, f"{name}: first loss {values}{seeds}"
