"""A finished run checks itself: the ways in which distillation code goes wrong without a sign.

Nothing is trained; every finding is made from the run's own files and models.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from configs.schema import Recipe
from measure.cost import CountedForward
from measure.expected import first_loss
from measure.judged import Reference
from measure.tables import arms_in
from student.hidden import student_of
from student.lab import (
    Lab,
    goal_of,
    lessons_of,
    new_student,
    outputs_of,
    teacher_of,
    teachers_task,
)
from student.recipe import match_of, objective_of, recipes_of
from tasks.rows import batch_order, collate, weight_of
from teacher.model import load_model
from teacher.outputs import name_of, needs_outputs, written
from teacher.shards import Outputs
from teacher.signal import shows_states, states_of, tail_of

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
        yield first_losses(lab, name, recipe)


def teacher_is_its_own_student(lab: Lab) -> Finding:
    if teachers_task(lab.config, lab.run, lab.task) is not lab.task:
        return None, "the teacher as its own student: it has other tokens than its students"
    teacher = load_model(lab.run.teacher)
    rows = lab.validation.take(np.arange(min(ROWS, len(lab.validation))))
    reference = Reference(teacher, lab.task, rows)
    fidelity = reference.metrics([reference.judge(teacher)])["fidelity"]
    worst = abs(fidelity["kl_teacher_student"].mean), abs(fidelity["kl_student_teacher"].mean)
    agree = fidelity["sequence_agreement"].mean, fidelity["top1_agreement"].mean
    good = max(worst) < 1e-6 and min(agree) == 1
    return good, f"the teacher as its own student: KL {max(worst):.1g}, agreement {min(agree):g}"


def some(rows: int, count: int = ROWS) -> np.ndarray:
    """Places of so many rows, evenly drawn."""
    return np.unique(np.linspace(0, rows - 1, min(count, rows)).astype(int))


@torch.no_grad()
def stored_outputs_equal_live_ones(lab: Lab, recipe: Recipe, outputs: Outputs) -> Finding:
    """The teacher, asked again about the rows as they are stored."""
    name, teacher = f"outputs/{name_of(recipe)}", teacher_of(lab, recipe, CountedForward)
    batch = collate(outputs.rows, some(len(outputs.rows)), lab.task.tokenizer.pad_token_id)
    own = teachers_task(lab.config, lab.run, lab.task, recipe.teachers)
    if recipe.access == "text" or own is not lab.task:
        return text_is_the_teachers(lab, recipe, outputs, name)
    options = {"use_cache": False} | shows_states(recipe.hidden_layers, recipe.relations)
    output = teacher(batch.input_ids, **options)
    logits = output.logits[batch.counted]
    live = torch.log_softmax(logits[:, : len(lab.task.tokenizer)], -1)
    signal, layers = outputs.signal(batch), recipe.hidden_layers
    pairs = {"nats": (live, signal.log_probs)}
    if signal.weights is not None:
        drawn, whole = signal.weights > 0, signal.weights.sum(-1)
        pairs["nats"] = live.gather(-1, signal.indices)[drawn], signal.log_probs[drawn]
        pairs["of all draws"] = torch.ones_like(whole), whole
    elif signal.indices is not None:  # the likeliest, and those that are named
        top = live.topk(recipe.k).values
        pairs = {
            "nats": (top, signal.log_probs),
            "nats at the tokens named": (live.gather(-1, signal.indices), signal.log_probs),
            "nats of the rest": (tail_of(live, signal.indices), signal.tail),
        }
    if layers:
        inside = outputs.inside(batch)
        states, looks = (
            each[batch.positions] for each in states_of(output, layers, recipe.relations)
        )
        pairs["deviations of the states"] = outputs.standardise(states), inside.hidden
        pairs["of the attention"] = looks, inside.attention
    coarse, found = 2.0**-8 if recipe.stored_as == "bfloat16" else 2.0**-10, {}
    for what, (now, then) in pairs.items():
        off = (now - then.to(now.dtype)).abs() - coarse * now.abs()
        found[what] = max(float(off.max()), 0.0)
    told = ", ".join(f"{off:.1g} {what}" for what, off in found.items())
    return max(found.values()) < STORED, f"{name}: at most {told} from the live teacher"


def text_is_the_teachers(lab: Lab, recipe: Recipe, outputs: Outputs, name: str) -> Finding:
    """Greedy answers, written again."""
    if recipe.sampling_temperature > 0:
        return None, f"{name}: sampled text, which the teacher would not write again"
    teacher, places = teacher_of(lab, recipe, CountedForward), some(len(outputs.rows), 32)
    stored = outputs.rows.take(places)
    again = written(
        teacher, lab.task, stored, recipe, torch.Generator(), lambda _: None,
        teachers_task(lab.config, lab.run, lab.task, recipe.teachers),
    )  # fmt: skip
    same = sum(record.tokens.tolist() == stored.row(i).tolist() for i, record in enumerate(again))
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
    for tensor in (signal.log_probs, signal.indices, signal.weights, signal.tail):
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


def gradients_are_sums(lab: Lab) -> Finding:
    """A batch at once, in five parts of other sizes, and row by row: the same gradient."""
    recipe = next(iter(recipes_of(lab.config).values()))
    if recipe.sequences == "student":
        return None, "gradients: students of the first recipe write their own text"
    lessons = lessons_of(lab, recipe, lab.config.seeds[0], CountedForward)
    model = new_student(lab, recipe, lessons, lab.config.seeds[0])
    training = lab.config.students.training
    goal = goal_of(lab, objective_of(recipe), match_of(recipe), training)
    indices = some(len(lessons.rows), 32)
    whole, found = weight_of(lessons.rows, indices, training.prompt_weight), []
    counts = 1, min(5, len(indices)), len(indices)
    for count in counts:
        model.zero_grad()
        for part in np.array_split(indices, count):
            goal.loss(model, lessons, part, whole).backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found.append(torch.cat(gradients))
    off = max(float((g - found[0]).norm() / found[0].norm()) for g in found[1:])
    return (
        off < BATCH_FREE,
        f"gradients: {off:.1g} apart between {counts} parts",
    )


def shuffled_does_not_help(result: dict[str, Any]) -> Finding:
    """It must be less faithful than the student it is the control of, and than whoever had no
    teacher at all."""
    arms = arms_in(result)
    if "shuffled" not in arms:
        return None, "shuffled: this config has no such control"
    agreement = {
        arm: arms[arm]["fidelity"]["sequence_agreement"]
        for arm in (next(iter(result["students"])), "scarce", "alone")
        if arm in arms
    }
    shuffled = arms["shuffled"]["fidelity"]["sequence_agreement"]
    told = (
        f"shuffled: {100 * shuffled['mean']:.1f} % of the teacher's answers, against "
        + ", ".join(f"{100 * found['mean']:.1f} % of {arm}" for arm, found in agreement.items())
    )
    if max(found["mean"] for found in (shuffled, *agreement.values())) < LEARNED:
        return None, f"{told}: nobody learned enough to tell"
    return all(shuffled["ci95"][1] < found["ci95"][0] for found in agreement.values()), told


def first_losses(lab: Lab, name: str, recipe: Recipe) -> Finding:
    """The loss logged after the first step of every student, against what its objective is by
    definition for an untrained one."""
    stages = {f"students/{name}/seed-{seed}": seed for seed in lab.config.seeds}
    logged = {
        line["stage"]: line["loss"]
        for line in lab.run.metrics()
        if line["stage"] in stages and line["step"] == 1
    }
    vocabulary = len(lab.task.tokenizer)
    training = lab.config.students.training
    lessons, worst, shown = None, 0.0, ""
    for stage, seed in stages.items():
        if lessons is None or recipe.shuffled or recipe.writes_itself:
            lessons = lessons_of(lab, recipe, seed, CountedForward)
        model = new_student(lab, recipe, lessons, seed)
        now = lessons.at(student_of(model), 0, 0.0)
        indices = np.arange(len(now.rows))
        if now is lessons:
            indices = batch_order(lessons.rows.lengths, training.batch_rows, seed)(0)
        expected = first_loss(recipe, model, now, indices, vocabulary, training.prompt_weight)
        off = abs(logged[stage] - expected) / max(abs(expected), 1e-3)
        if not off < worst:  # nan is the worst
            worst, shown = off, f"{logged[stage]:.5f}, expected {expected:.5f}"
    seeds = f", the worst of {len(stages)} seeds" if len(stages) > 1 else ""
    return worst < FIRST_LOSS, f"{name}: first loss {shown}{seeds}"
