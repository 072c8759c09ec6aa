"""The report: one self-contained HTML file for people who would rather look than read.

Reads a finished run's files and what the evaluation handed over; computes no metric of its own.
"""

import itertools
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
import numpy as np
import torch

from configs.runs import Run
from measure.check import metrics_of
from measure.figures import (
    accuracy_by_steps,
    agreement_by_temperature,
    bytes_against_kl,
    fidelity_against_cost,
    first_wrong_steps,
    learning_curves,
    reliability,
    scaling,
    strips,
    thinking_longer,
    where_traces_pay,
)
from measure.judged import Judged, Reference, completion_logits
from measure.laws import alike
from measure.tables import (
    Columns,
    arms_in,
    cells_of,
    columns_of,
    facts_of,
    more_cells,
    more_headings,
)

COLOURS = mpl.colormaps["tab20"].colors[::2] + mpl.colormaps["tab20"].colors[1::2]
EXAMPLES = 24
SHOWN_WORDS = 4


def render_report(
    run: Run, result: dict[str, Any], reference: Reference, first: dict[str, Judged]
) -> str:
    """HTML. `first`: the first seed of every arm on the held-out rows of `reference`."""
    arms = arms_in(result)
    colours = dict(zip(arms, itertools.cycle(COLOURS), strict=False))
    main = next(iter(result["students"]))
    shown = [arm for arm in ("teacher", main, "alone") if arm in arms]
    answers = side_by_side(reference, first, shown)
    task, columns = reference.task, columns_of(result)
    splits = {f"held-out {task.things}": arms}
    if "long" in result["teacher"]:
        long = {arm: {**entry, **entry["long"]} for arm, entry in arms.items()}
        splits[f"long {task.things}"] = long
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    )
    return template.render(
        name=result["config"]["name"],
        main=main,
        result=result,
        facts=facts_of(result),
        headings=[
            "parameters",
            "TFLOPs",
            *columns,
            "ms per answer",
            "answers per s",
            *more_headings(result),
        ],
        tables={
            title: {
                arm: [*report_cells(entry, columns), *more_cells(result, arm)]
                for arm, entry in entries.items()
            }
            for title, entries in splits.items()
        },
        figures=figures_of(run, result, first, arms, colours),
        arms=shown,
        thing=task.things.removesuffix("s"),
        differ=[a for a in answers if a["teacher"] != a[main]][:EXAMPLES],
        copied=[a for a in answers if a["teacher"] == a[main] and not a["right"]][:EXAMPLES],
        knowledge=dark_knowledge(reference),
    )


def figures_of(
    run: Run,
    result: dict[str, Any],
    first: dict[str, Judged],
    arms: dict[str, Any],
    colours: dict[str, str],
) -> dict[str, tuple[str, str]]:
    """{title: (figure, caption)}, those that have something to show."""
    compared = result["config"].get("compare") is not None
    answers = [arm for arm, e in result["students"].items() if e["recipe"]["traces"] == "none"]
    alone = f" Of {', '.join(answers)} over the answers alone." if answers else ""
    found = {
        "Learning curves": (
            learning_curves(run, colours),
            f"Validation loss in nats per token while training, against the FLOPs spent.{alone} "
            "One line per seed; where every arm has a plot of its own, grey is the teacher and the "
            "first student.",
        ),
    }
    if result["cost"]["fraction_of_teacher"]["flops"]:
        found["Fidelity against cost"] = (
            fidelity_against_cost(result, arms, colours, "seconds" if compared else "flops"),
            "How often a student gives the teacher's very own answer, against what it cost, its "
            "outputs included. All students and controls have the same budget of FLOPs by design"
            f"{but_for_some(result)}. Dashed: nothing cheaper is as faithful."
            + (" Time: the median seed, on a machine that did other work too." if compared else ""),
        )
    if len(alike(result, ("access", "k", "stored_as"))) > 2:
        found["Bytes against fidelity"] = (
            bytes_against_kl(result, arms, colours),
            "Students whose recipes differ only in what the teacher reveals: how far they end from "
            "its distribution, against what a token of its outputs weighs on disk.",
        )
    if len(alike(result, ("temperature",))) > 2:
        found["Temperature"] = (
            agreement_by_temperature(result, arms, colours),
            "Students whose recipes differ only in temperature.",
        )
    things = "words" if result["config"]["task"]["name"] == "pronounce" else "problems"
    laws = result["laws"]
    if "words" in laws:
        found[f"How many {things}"] = (
            scaling(arms, laws["words"], f"different {things} that the teacher answers", colours),
            f"Students that differ only in how many {things} the teacher answered, trained equally "
            "long. Dashed: the law that fits best, a power of their number and what no more of "
            "them would mend.",
        )
    if "size" in laws:
        found["How large a student"] = (
            scaling(arms, laws["size"], "parameters of the student, of the teacher's", colours),
            "Students that differ only in size, at the same FLOPs: small ones for many steps, "
            "large ones for few. Dashed: the law that fits best, one power of the size that falls "
            "(the capacity gap) and one that rises (too few steps).",
        )
    if "reasoning" in result["teacher"]:
        found |= reasoning_figures(result, arms, colours)
    if not all("calibration" in judged.columns for judged in first.values()):
        return found  # a teacher with other tokens is known by its answers alone
    return found | {
        "Reliability": (
            reliability(first, colours),
            "When a model is this sure of a token, how often is it right? The diagonal is "
            "perfect calibration.",
        )
    }


def but_for_some(result: dict[str, Any]) -> str:
    """`, but for those with a smaller share of it: warm`, if there are any."""
    students = result["students"].items()
    smaller = [arm for arm, entry in students if entry["recipe"].get("budget_share", 1) < 1]
    return f", but for those with a smaller share of it: {', '.join(smaller)}" if smaller else ""


def reasoning_figures(
    result: dict[str, Any], arms: dict[str, Any], colours: dict[str, str]
) -> dict[str, tuple[str, str]]:
    """Of a task that reasons."""
    thinking = {arm: entry for arm, entry in arms.items() if "reasoning" in entry}
    found = {
        "Accuracy by number of steps": (
            accuracy_by_steps(arms, colours),
            "Right answers to held-out problems. All students cost the same FLOPs"
            f"{but_for_some(result)}.",
        ),
        "Test-time scaling": (
            thinking_longer(thinking, colours),
            "Solid: the trace is cut after so many tokens and an answer is forced. Dashed: the "
            "commonest of 1, 4, 16 and 64 drawn answers. First seed of every arm, 100 problems "
            "each.",
        ),
        "Where traces go wrong": (
            first_wrong_steps(thinking, colours),
            "The rest has no wrong step. First seed of every arm.",
        ),
    }
    if result["map"]:
        found["Where traces pay"] = (
            where_traces_pay(result),
            "Points of right answers that a student taught by traces is ahead of one taught by "
            "answers alone (blue; red: behind): same size (in thousands of parameters), same "
            "problems (how many), same FLOPs (in % of the teacher's). no: it does not beat it; ?: "
            "inconclusive; else it beats it, all cells corrected together. Chains of one or two "
            "steps also stand in the middle of training traces, which answers alone never show.",
        )
    return found


def report_cells(entry: dict[str, Any], columns: Columns) -> list[str]:
    cost = entry["cost"]
    return [
        f"{entry['params']:,}",
        f"{cost['flops'] / 1e12:.2f}",
        *cells_of(entry, columns, interval=True),
        f"{cost['latency_ms']:.1f}",
        f"{cost['answers_per_second']:.0f}",
    ]


def side_by_side(
    reference: Reference, first: dict[str, Judged], arms: list[str]
) -> list[dict[str, Any]]:
    """Every row in the order of its id (a hash): the question, the answers, what is right."""
    task, rows = reference.task, reference.rows
    right = reference.judged.columns["wrong"] == 0
    return [
        {
            "question": task.question(rows, i),
            "listed": task.truths(task.question(rows, i)),
            "right": bool(right[i]),
            **{arm: first[arm].answers.texts[i] for arm in arms},
            "wrong": {arm: bool(first[arm].columns["wrong"][i]) for arm in arms},
        }
        for i in np.argsort(rows.ids)
    ]


def dark_knowledge(reference: Reference) -> list[dict[str, Any]]:
    """What the teacher is least sure of, with its likeliest tokens at each position."""
    task, rows = reference.task, reference.rows
    if not reference.by_token:
        return []
    unsure = reference.judged.columns["entropy"] / reference.judged.columns["positions"]
    shown = []
    for i in np.argsort(unsure, kind="stable")[::-1][:SHOWN_WORDS]:
        logits, _, _ = completion_logits(reference.teacher, task, rows, np.array([i]))
        top = torch.softmax(logits, dim=-1).topk(5, dim=-1)
        positions = [
            {
                "target": task.tokens[target],
                "top": [(task.tokens[t], p) for t, p in zip(likeliest, chances, strict=True)],
            }
            for target, likeliest, chances in zip(
                rows.completion(i), top.indices.tolist(), top.values.tolist(), strict=True
            )
        ]
        shown.append({"question": task.question(rows, i), "positions": positions})
    return shown


def render_check(result: dict[str, Any], reference: dict[str, Any], lines: list[str]) -> str:
    """HTML of a check: what it said, and every metric inside the distribution of its seeds."""
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        Path(__file__).with_name("check.html").read_text(encoding="utf-8")
    )
    bands = reference.get("bands") or {}
    return template.render(
        name=result["config"]["name"],
        lines=lines,
        seeds=max((len(band["values"]) for band in bands.values()), default=0),
        image=strips(metrics_of(result), bands) if bands else None,
    )
