"""A finished run checks itself: the ways in which distillation code goes wrong without a sign.

Nothing is trained; every finding is made from the run's own files and models.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from configs.schema import Recipe
from measure.cost import CountedForward
from measure.judged import Reference
from measure.tables import arms_in
from student.lab import Lab, lessons_of, new_student, outputs_of, student_of, teacher_of
from student.lessons import Lessons
from student.recipe import match_of, objective_of, recipes_of
from tasks.rows import batch_order, collate
from teacher.model import generate, load_model
from teacher.outputs import name_of, needs_outputs
from teacher.shards import Outputs

ROWS = 256  # that a finding is made from
STORED = 2e-2  # nats that a stored log-probability may be off; float16 is off by 2^-11 of it
BATCH_FREE = 1e-3  # relative error of a float32 gradient that was summed in another order
FIRST_LOSS = 1e-3  # relative error of a loss
LEARNED = 0.05  # sequence agreement below which nobody learned enough to tell who helped

Finding = tuple[bool | None, str]  # holds, does not hold, or None: nothing to check


def selfcheck(lab: Lab, result: dict[str, Any]) -> Iterator[Finding]:
    """All findings, one after the other. `result` is eval.json."""
    yield teacher_is_its_own_student(lab)
    recipes = {name_of(r): r for r in recipes_of(lab.config).values() if needs_outputs(r)}
    for recipe in recipes.values():
        outputs = outputs_of(lab, recipe)
        yield stored_outputs_equal_live_ones(lab, recipe, outputs)
        yield outputs_follow_their_row(recipe, outputs, outputs_of(lab, recipe).shuffle(0))
    yield gradients_are_sums(lab)
    yield shuffled_does_not_help(result)
    for name, recipe in recipes_of(lab.config).items():
        yield first_loss(lab, name, recipe)


def teacher_is_its_own_student(lab: Lab) -> Finding:
    teacher = load_model(lab.run.teacher)
    rows = lab.validation.take(np.arange(min(ROWS, len(lab.validation))))
    reference = Reference(teacher, lab.task, rows)
    fidelity = reference.metrics([reference.judge(teacher)])["fidelity"]
    worst = abs(fidelity["kl_teacher_student"].mean), abs(fidelity["kl_student_teacher"].mean)
    agree = fidelity["sequence_agreement"].mean, fidelity["top1_agreement"].mean
    good = max(worst) < 1e-6 and min(agree) == 1
    return good, f"the teacher as its own student: KL {max(worst):.1g}, agreement {min(agree):g}"


def some(rows: int) -> np.ndarray:
    """Places of ROWS rows, evenly drawn."""
    return np.unique(np.linspace(0, rows - 1, min(ROWS, rows)).astype(int))


@torch.no_grad()
def stored_outputs_equal_live_ones(lab: Lab, recipe: Recipe, outputs: Outputs) -> Finding:
    """The teacher, asked again about the rows as they are stored."""
    name, teacher = f"outputs/{name_of(recipe)}", teacher_of(lab, recipe, CountedForward)
    batch = collate(outputs.rows, some(len(outputs.rows)), lab.task.tokenizer.pad_token_id)
    if recipe.access == "text":
        return greedy_text_is_the_teachers(lab, recipe, outputs, name)
    logits = teacher(batch.input_ids, use_cache=False).logits[batch.counted]
    live = torch.log_softmax(logits[:, : len(lab.task.tokenizer)], -1)
    signal = outputs.signal(batch)
    if signal.indices is not None:
        live = live.gather(-1, signal.indices)
    revealed = signal.log_probs.to(live.dtype)
    if signal.weights is not None:
        live, revealed = live[signal.weights > 0], revealed[signal.weights > 0]
    coarse = 2.0**-8 if recipe.stored_as == "bfloat16" else 2.0**-10
    off = ((live - revealed).abs() - coarse * live.abs()).max().item()
    return off < STORED, f"{name}: at most {max(off, 0):.1g} nats from the live teacher"


def greedy_text_is_the_teachers(lab: Lab, recipe: Recipe, outputs: Outputs, name: str) -> Finding:
    if recipe.sampling_temperature > 0:
        return None, f"{name}: sampled text, which the teacher would not write again"
    teacher, places = teacher_of(lab, recipe, CountedForward), some(len(outputs.rows))[::8]
    same = 0
    for i in places:
        answer = generate(
            teacher,
            [outputs.rows.prompt(i)],
            longest=lab.task.longest_answer,
            end=lab.task.tokenizer.eos_token_id,
        )[0]
        same += answer.tokens.tolist() == outputs.rows.completion(i).tolist()
    return same == len(places), f"{name}: {same} of {len(places)} answers written again alike"


def outputs_follow_their_row(recipe: Recipe, honest: Outputs, shuffled: Outputs) -> Finding:
    """In any order of the rows, and in the control that moves them on purpose."""
    places = some(len(honest.rows))
    order = np.random.Generator(np.random.PCG64(0)).permutation(places)
    there, here = of_each_row(honest, places), of_each_row(honest, order)
    kept = all(same(here[i], there[i]) for i in places)
    places = some(len(shuffled.rows))
    moved = of_each_row(shuffled, places)
    sources = of_each_row(honest, np.unique(shuffled.source[places]))
    lands = all(same(moved[i], sources[shuffled.source[i]]) for i in places)
    own = honest.rows.ids[shuffled.source[places]] == shuffled.rows.ids[places]
    good = kept and lands and not own.any()
    return good, (
        f"outputs/{name_of(recipe)}: {len(order)} rows keep their outputs in another order; "
        f"shuffled, {int((~own).sum())} of {len(places)} have those of another row"
    )


def of_each_row(outputs: Outputs, places: np.ndarray) -> dict[int, list[torch.Tensor]]:
    """What was revealed for each row, read in one batch."""
    batch = collate(outputs.rows, places, 0)
    signal = outputs.signal(batch)
    sizes = batch.counted.sum(1).tolist()
    parts = [signal.targets.split(sizes)]
    for tensor in (signal.log_probs, signal.indices, signal.weights):
        if tensor is not None:
            parts.append(tensor.split(sizes))
    return {int(place): [part[i] for part in parts] for i, place in enumerate(places)}


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    """Equal, but for what fills up the rows of a batch; the first is the text, all of it."""
    if a[0].shape != b[0].shape:
        return False
    width = [min(x.shape[-1], y.shape[-1]) for x, y in zip(a, b, strict=True)]
    pairs = zip(a, b, width, strict=True)
    return all(torch.equal(x[..., :w], y[..., :w]) for x, y, w in pairs)


def step_loss(
    lab: Lab, recipe: Recipe, model: nn.Module, lessons: Lessons, parts: list[np.ndarray]
) -> torch.Tensor:
    """The loss of one step, from its definition: sums over positions of all parts, divided by the
    number of positions of all parts."""
    objective, match = objective_of(recipe), match_of(recipe)
    weight = lab.config.students.training.prompt_weight
    total = inside = torch.zeros((), dtype=student_of(model).dtype)
    tokens, positions = 0.0, 0
    for part in parts:
        batch = collate(lessons.rows, part, lab.task.tokenizer.pad_token_id, weight)
        shown = model(batch.input_ids, use_cache=False)
        logits = shown.logits[batch.counted][:, : len(lab.task.tokenizer)]
        total = total + (objective(logits, lessons.signal(batch)) * batch.weights).sum()
        tokens += float(batch.weights.double().sum())
        if match:
            inside = inside + match(shown, batch.positions, lessons.inside(batch)).sum()
            positions += int(batch.positions.sum())
    return total / tokens + (inside / positions if match else 0.0)


def gradients_are_sums(lab: Lab) -> Finding:
    """A batch at once, in five parts of other sizes, and row by row: the same gradient."""
    recipe = next(iter(recipes_of(lab.config).values()))
    if recipe.sequences == "student":
        return None, "gradients: students of the first recipe write their own text"
    lessons = lessons_of(lab, recipe, lab.config.seeds[0], CountedForward)
    model = new_student(lab, recipe, lessons, lab.config.seeds[0])
    indices = some(len(lessons.rows))[:: max(1, ROWS // 32)]
    found = []
    for count in (1, 5, len(indices)):
        model.zero_grad()
        step_loss(lab, recipe, model, lessons, np.array_split(indices, count)).backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found.append(torch.cat(gradients))
    off = max(float((g - found[0]).norm() / found[0].norm()) for g in found[1:])
    return off < BATCH_FREE, f"gradients: {off:.1g} apart between 1, 5 and {len(indices)} parts"


def shuffled_does_not_help(result: dict[str, Any]) -> Finding:
    arms = arms_in(result)
    if "shuffled" not in arms:
        return None, "shuffled: this config has no such control"
    taught = next(iter(result["students"]))
    shuffled, honest = (arms[a]["fidelity"]["sequence_agreement"] for a in ("shuffled", taught))
    if max(shuffled["mean"], honest["mean"]) < LEARNED:
        return None, f"shuffled: neither it nor {taught} learned enough to tell"
    good = shuffled["ci95"][1] < honest["ci95"][0]
    return good, (
        f"shuffled: {100 * shuffled['mean']:.1f} % of the teacher's answers, against "
        f"{100 * honest['mean']:.1f} % of {taught}"
    )


def first_loss(lab: Lab, name: str, recipe: Recipe) -> Finding:
    """The loss logged after the first step, against the one of an untrained student on the same
    rows, computed from those of one length at a time, without padding."""
    seed = lab.config.seeds[0]
    stage = f"students/{name}/seed-{seed}"
    logged = next(line["loss"] for line in lab.run.metrics() if line["stage"] == stage)
    lessons = lessons_of(lab, recipe, seed, CountedForward)
    model = new_student(lab, recipe, lessons, seed)
    now = lessons.at(student_of(model), 0, 0.0)
    if now is lessons:
        batch_rows = lab.config.students.training.batch_rows
        indices = batch_order(lessons.rows.lengths, batch_rows, seed)(0)
    else:
        indices = np.arange(len(now.rows))
    lengths = now.rows.lengths_of(indices)
    parts = [indices[lengths == length] for length in np.unique(lengths)]
    with torch.no_grad():
        expected = float(step_loss(lab, recipe, model, now, parts))
    off = abs(logged - expected) / max(abs(expected), 1e-3)
    return off < FIRST_LOSS, f"{name}: first loss {logged:.5f}, expected {expected:.5f}"
