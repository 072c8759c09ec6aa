"""The result of a run: eval.json, assembled from evaluations, ledger and config."""

import statistics
import time
from functools import partial
from typing import Any

import numpy as np
import torch

from configs.schema import Config, Verdict
from experiment.bought import open_bought
from experiment.cost import CountedForward
from experiment.environment import environment, evaluation_sha256
from experiment.experiment import open_outputs, open_teacher, teacher_task
from experiment.plan import Plan
from experiment.run import Run
from measure.evaluate import (
    Evaluation,
    RecordedReference,
    TeacherReference,
    free_running,
    summaries,
)
from measure.metrics import DIVERGENCE, metrics_of
from measure.reasoning import pairs_of_traces, reasoning, steps_by_split
from measure.savings import bought, savings
from measure.statistics import Estimate, share_of_gap
from measure.verdicts import ONE_RUN, Comparison, claim_of, verdicts
from models.language import Forward
from models.rows import Rows
from tasks.task import Task
from teacher.outputs import OutputsRequest

# {model: {split: {"quality" or "fidelity": {metric: estimate}}}}
Estimates = dict[str, dict[str, dict[str, dict[str, Estimate]]]]


def teacher_references(
    config: Config, run: Run, task: Task, rows: dict[str, Rows]
) -> tuple[CountedForward | None, dict[str, TeacherReference]]:
    """(the teacher, {split: the teacher on these rows}): by its weights or, where only answers were
    bought, by these."""
    if config.sold_elsewhere:
        answers = open_bought(run).answers
        return None, {
            split: RecordedReference([answers[split][str(i)] for i in found.ids], task, found)
            for split, found in rows.items()
        }
    teacher, own_task = CountedForward(open_teacher(run, task)), teacher_task(config, run, task)
    return teacher, {s: TeacherReference(teacher, task, r, own_task) for s, r in rows.items()}


def writes_reasoning(plan: Plan, name: str) -> bool:
    """Whether a model was trained to reason before it answers; teachers are."""
    recipe = plan.recipes.get(name)
    return recipe is None or recipe.outputs.traces != "none"


def entry(
    run: Run,
    plan: Plan,
    task: Task,
    name: str,
    estimates: dict[str, dict[str, dict[str, Estimate]]],
    measured: dict[str, Any],
) -> dict[str, Any]:
    """One model's entry in eval.json: its estimates by split, those of the main split at the top
    level, and the other measurements."""
    stages = [plan.stage(name, seed) for seed in plan.seeds_of(name)]
    recipe = plan.recipes.get(name)
    ledger = [run.cost_of(stage) for stage in stages]
    by_split = {
        split: summaries(
            groups,
            metrics_of(task),
            is_teacher=name == "teacher",
            writes_reasoning=writes_reasoning(plan, name),
        )
        for split, groups in estimates.items()
    }
    first, *others = by_split
    speed = measured.pop("speed", {})
    return {
        "params": run.manifest["stages"][stages[0]]["params"],
        "sha256": [run.manifest["stages"][stage]["sha256"] for stage in stages],
        "steps": [row["steps"] for row in ledger],
        "rows": ledger[0].get("rows"),
        "recipe": recipe.model_dump(mode="json") if recipe else None,
        **by_split[first],
        **{split: by_split[split] for split in others},
        "cost": {
            "flops": statistics.mean(row["flops"] for row in ledger),
            "seconds": statistics.mean(row["seconds"] for row in ledger),
            **speed,
        },
        **measured,
    }


def reasoning_of(
    model: Forward,
    references: dict[str, TeacherReference],
    evaluations: dict[str, list[Evaluation]],
    reasons: bool,
) -> dict[str, Any]:
    """Test-time scaling of a model's first seed on every split, for a task whose problems have
    steps."""
    if not next(iter(references.values())).task.steps:
        return {}
    found = {
        split: reasoning(
            model,
            reference.task,
            reference.rows,
            evaluations[split][0].answers.texts,
            reasons,
            seed=0,
        )
        for split, reference in references.items()
    }
    first, *others = found
    return {"reasoning": found[first] | {split: found[split] for split in others}}


def measure_speed(model: torch.nn.Module, task: Task, sample: Rows) -> dict[str, float]:
    """Latency of one greedy answer (median of 20), and answers per second in one batch."""
    times = []
    for i in range(20):
        started = time.perf_counter()
        free_running(model, task, sample.take(np.array([i % len(sample)])))
        times.append(time.perf_counter() - started)
    started = time.perf_counter()
    free_running(model, task, sample)
    return {
        "latency_ms": 1000 * statistics.median(times),
        "answers_per_second": len(sample) / (time.perf_counter() - started),
    }


def decide(
    config: Config,
    task: Task,
    estimates: Estimates,
    splits: list[str],
    committed: dict[str, dict[str, float]],
) -> list[dict]:
    """The verdicts on all claims of the config over these splits; one run is shown beside the
    committed ones."""
    claims = [claim for claim in config.claims() if claim.split in splits]
    found = verdicts([comparison(claim, task, estimates) for claim in claims])
    for verdict in found:
        if verdict["result"] == ONE_RUN and claim_of(verdict) in committed:
            verdict["committed"] = committed[claim_of(verdict)]
    return found


def comparison(claim: Verdict, task: Task, estimates: Estimates) -> Comparison:
    """What a claim compares, with the threshold that the config fixed beforehand."""
    first, second = (
        estimates[name][claim.split]["quality"] | estimates[name][claim.split]["fidelity"]
        for name in claim.names
    )
    sign = metrics_of(task)[claim.metric].sign
    return Comparison(
        claim.claim, claim.metric, sign, claim.threshold, first[claim.metric], second[claim.metric],
        claim.split, claim.exploratory,
    )  # fmt: skip


def map_of_traces(config: Config, task: Task, estimates: Estimates) -> list[dict[str, Any]]:
    """Where traces pay: a verdict for every pair of students and number of steps, an exploration
    whose cells are all corrected together."""
    explored = partial(Verdict, exploratory=True)
    cells = [
        (split, steps, explored(claim=claim, metric=task.accuracy_at(steps), split=split))
        for name, other in pairs_of_traces(config.recipes)
        for claim in [f"{name} beats {other}"]
        for split, steps in steps_by_split(task, estimates["teacher"])
    ]
    compared = [comparison(claim, task, estimates) for _, _, claim in cells]
    decided = verdicts(compared, together=True)
    return [
        {**verdict, "split": split, "steps": steps}
        for verdict, (split, steps, _) in zip(decided, cells, strict=True)
    ]


def gaps(config: Config, task: Task, estimates: Estimates, split: str) -> dict[str, Any]:
    """The fraction of the gap from a control to the teacher that each student closes, in the task's
    headline metric."""
    sign = metrics_of(task)[task.headline].sign
    if task.headline not in estimates["teacher"][split]["quality"]:
        return {name: {} for name in config.recipes}
    levels = {name: found[split]["quality"][task.headline] for name, found in estimates.items()}
    return {
        name: {
            f"{control}_to_teacher": share_of_gap(
                sign, levels[control], levels[name], levels["teacher"]
            )
            for control in ("low_data", "baseline")
            if control in config.controls
        }
        for name in config.recipes
    }


def divergences(estimates: Estimates, split: str) -> dict[str, Estimate]:
    """{model: its divergence from the teacher}, of those whose distributions were compared."""
    return {
        name: found[split]["fidelity"][DIVERGENCE]
        for name, found in estimates.items()
        if DIVERGENCE in found[split]["fidelity"]
    }


def studies_of_cost(
    result: dict[str, Any], task: Task, estimates: Estimates, split: str
) -> dict[str, Any]:
    """What students of several budgets cost for the same quality and for the same fidelity; and
    those whose outputs were bought, if there are any."""
    metrics = metrics_of(task)
    fidelity = next((name for name in task.table if metrics[name].needs_teacher), None)
    shown = dict.fromkeys(name for name in (task.headline, fidelity) if name)
    signs = {name: metrics[name].sign for name in shown}
    values = {
        name: found[split]["quality"] | found[split]["fidelity"]
        for name, found in estimates.items()
    }
    found = bought(result, values, signs)
    return {"savings": savings(result, values, signs)} | ({"bought": found} if found else {})


def costs(run: Run, plan: Plan, task: Task, evaluation: dict[str, Any]) -> dict[str, Any]:
    """A row per stage, and outputs plus one student as a fraction of the teacher's training."""
    teacher = run.cost_of("teacher")
    fractions, stored = {}, {}
    for name, recipe in plan.recipes.items():
        request = plan.request(recipe)
        if request:
            made = run.manifest["stages"][request.stage]
            stored[name] = {
                "rows": made["rows"],
                "different": made.get("different"),
                "bytes_per_token": run.cost_of(request.stage).get("bytes_per_token"),
                "kept": run.cost_of(plan.stage(name)).get("rows"),
                **share_right(run, request, task),
                **paid_for(run.cost_of(request.stage)),
            }
        trained = [run.cost_of(plan.stage(name, seed)) for seed in plan.seeds_of(name)]
        before = [run.cost_of(stage) for stage in plan.prerequisites(recipe, uncharged=True)]
        fractions[name] = {
            key: (statistics.median(row[key] for row in trained) + sum(row[key] for row in before))
            / teacher[key]
            if teacher["steps"] > 0 and teacher[key]  # not a pretrained teacher, of unknown cost
            else None
            for key in ("flops", "seconds", "joules", "money")
        }
    main = next(iter(fractions))
    before = plan.prerequisites(plan.config.recipes[main], uncharged=True)
    fixed = teacher["flops"] + sum(run.cost_of(stage)["flops"] for stage in before)
    each = run.cost_of(plan.stage(main))["flops"]
    amortised = {
        str(count): (fixed + count * each) / (count * teacher["flops"])
        for count in ((1, 10, 100) if teacher["flops"] else ())
    }
    return {
        "stages": [*cost_of_tuning(plan.config), *run.ledger, evaluation],
        "fraction_of_teacher": fractions[main],
        "fraction_of_teacher_by_student": fractions,
        "outputs_by_student": stored,
        "flops_per_student_with_teacher": amortised,
        "joules_source": teacher["joules_source"],
        **({"published": teacher["published"]} if "published" in teacher else {}),
        "load_of_others": run.manifest.get("load_of_others"),
    }


def share_right(run: Run, request: OutputsRequest, task: Task) -> dict[str, float]:
    """How many of the teacher's answers are right, where it reasons."""
    if not (task.shows_reasoning and request.sequences == "teacher"):
        return {}
    return {"right": float(task.rewards(open_outputs(run, request.stage).rows).mean())}


def paid_for(row: dict[str, Any]) -> dict[str, Any]:
    """What outputs cost that were bought."""
    if "requests" not in row:
        return {}
    tokens = row["prompt_tokens"] + row["completion_tokens"]
    return {"paid": {"tokens": tokens, "money": row["money"]}}


def cost_of_tuning(config: Config) -> list[dict[str, Any]]:
    """The row of a stage, as recorded when the config was tuned."""
    if config.tuned is None:
        return []
    spent = config.tuned.model_dump(include={"flops", "seconds", "joules", "money"})
    return [{"stage": "tuning", **spent, "currency": config.cost.currency, "peak_memory_mb": 0}]


def environments(run: Run) -> dict[str, Any]:
    """Where the run was evaluated and trained."""
    return {
        **environment(torch.get_num_threads()),
        "evaluation": evaluation_sha256(),
        "finished": run.manifest["finished"],
        "trained": run.manifest["environment"],
        "earlier": run.manifest.get("earlier_environments", []),
    }
