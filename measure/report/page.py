"""The report: one self-contained HTML file with tables, figures and examples.

It reads eval.json, the log and the evaluations, and computes no metrics.
"""

import base64
import io
import itertools
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
import matplotlib.image
import numpy as np
import torch

from measure.evaluate import Evaluation, TeacherReference, completion_logits
from measure.laws import students_differing_in
from measure.metrics import CALIBRATION, metrics_in
from measure.report.figures import (
    ACCESS_KEYS,
    accuracy_by_steps,
    bytes_against_kl,
    fidelity_against_cost,
    fidelity_by_temperature,
    first_wrong_steps,
    learning_curves,
    quality_against_cost,
    reliability,
    scaling,
    strips,
    thinking_longer,
    where_traces_pay,
)
from measure.report.tables import (
    Columns,
    cells_of,
    columns_of,
    facts_of,
    fixed,
    heading,
    models_in,
    more_cells,
    more_headings,
    more_tables,
    per_seed_values,
    task_of,
)
from models.rows import Rows
from tasks.task import Task

COLOURS = mpl.colormaps["tab20"].colors[::2] + mpl.colormaps["tab20"].colors[1::2]
EXAMPLES = 24  # rows per table of answers
UNCERTAIN = 4  # rows whose distributions are shown

Figures = dict[str, tuple[str, str]]  # {title: (image, caption)}


def render_report(
    log: list[dict[str, Any]],
    result: dict[str, Any],
    reference: TeacherReference,
    first: dict[str, Evaluation],
) -> str:
    """HTML. log: the lines of metrics.jsonl. first: the first seed of every model on the held-out
    rows of `reference`."""
    models = models_in(result)
    colours = dict(zip(models, itertools.cycle(COLOURS), strict=False))
    main = next(iter(result["students"]))
    shown = [name for name in ("teacher", main, "baseline") if name in models]
    answers = side_by_side(reference, first, shown)
    task, columns = reference.task, columns_of(result)
    splits = {f"held-out {task.item_noun}": models}
    for split in task.evaluation_splits[1:]:
        if split in result["teacher"]:
            of_split = {name: {**entry, **entry[split]} for name, entry in models.items()}
            splits[f"{split} {task.item_noun}"] = of_split
    return template("report.html").render(
        name=result["config"]["name"],
        main=main,
        result=result,
        facts=facts_of(result),
        headings=[
            "parameters",
            "TFLOPs",
            *map(heading, columns.values()),
            "ms per answer",
            "answers per s",
            *more_headings(result),
        ],
        tables={
            title: {
                name: [*report_cells(entry, columns), *more_cells(result, name)]
                for name, entry in entries.items()
            }
            for title, entries in splits.items()
        },
        figures=figures_of(log, result, first, colours),
        models=shown,
        item=task.item_noun.removesuffix("s"),
        differ=[a for a in answers if a["teacher"] != a[main]][:EXAMPLES],
        graded="wrong" in reference.evaluation.columns,
        copied=[a for a in answers if a["teacher"] == a[main] and not a["right"]][:EXAMPLES],
        uncertain=dark_knowledge(reference),
        more_tables=more_tables(result),
        tuning=tuning_rows(result),
        tuned_columns=[heading(metrics_in(result)[name]) for name in task.table],
    )


def tuning_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per try, the best of each model first; metrics on the validation split."""
    metrics, table = metrics_in(result), task_of(result).table
    tuned = result["config"].get("tuned") or {"tries": {}}
    return [
        {
            "model": name,
            "best": number == 0,
            "rate": f"{one['learning_rate']:g}",
            "rows": f"{one['transfer_rows']:,}" if one["transfer_rows"] else "-",
            "values": [
                fixed(metrics[key].scale * one["validation"][key], metrics[key].digits)
                if key in one["validation"]
                else "-"
                for key in table
            ],
        }
        for name, tries in tuned["tries"].items()
        for number, one in enumerate(tries)
    ]


def template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(Path(__file__).with_name(name).read_text(encoding="utf-8"))


def figures_of(
    log: list[dict[str, Any]],
    result: dict[str, Any],
    first: dict[str, Evaluation],
    colours: dict[str, str],
) -> Figures:
    """The figures that apply to this run."""
    compares = result["config"].get("compare") is not None
    students = result["students"].items()
    unreasoned = [n for n, e in students if e["recipe"]["outputs"]["traces"] == "none"]
    without = f" For {', '.join(unreasoned)}, over the answers only." if unreasoned else ""
    found = {
        "Learning curves": (
            learning_curves(log, colours),
            f"Validation loss in nats per token during training, against the FLOPs spent.{without} "
            "One line per seed; if every model has its own plot, grey is the teacher and "
            "the first student.",
        ),
    }
    if result["cost"]["fraction_of_teacher"]["flops"]:
        found["Fidelity against cost"] = (
            fidelity_against_cost(result, colours, "seconds" if compares else "flops"),
            "How closely a student follows the teacher, against its cost, outputs included. "
            f"All students and controls have the same budget of FLOPs by design"
            f"{smaller_budgets(result)}. Dashed: the Pareto front."
            + (" Time: the median over seeds, on a shared machine." if compares else ""),
        )
    if len(students_differing_in(result, ACCESS_KEYS)) > 2:
        found["Bytes against fidelity"] = (
            bytes_against_kl(result, colours),
            "Students whose recipes differ only in what the teacher reveals: their divergence from "
            "it, against the bytes per token of its outputs.",
        )
    if len(students_differing_in(result, ("temperature",))) > 2:
        found["Temperature"] = (
            fidelity_by_temperature(result),
            "Students whose recipes differ only in temperature.",
        )
    found |= law_figures(result, colours)
    saved = result.get("savings")
    for name in saved["needs"] if saved else ():
        found[f"Savings: {metrics_in(result)[name].heading}"] = (
            quality_against_cost(result, name),
            "Students of each kind at several budgets; cost with outputs, tuned at each budget.",
        )
    if "reasoning" in result["teacher"]:
        found |= reasoning_figures(result, colours)
    if all(CALIBRATION in evaluation.columns for evaluation in first.values()):
        found["Reliability"] = (
            reliability(first, colours),
            "How often a model is right at each level of confidence in a token. The diagonal is "
            "perfect calibration.",
        )
    return found


def law_figures(result: dict[str, Any], colours: dict[str, str]) -> Figures:
    """Figures of studies that vary the number of rows or the size of the student."""
    items, laws, found = task_of(result).item_noun, result["laws"], {}
    if "rows" in laws:
        found[f"How many {items}"] = (
            scaling(result, laws["rows"], f"different {items} that the teacher answers", colours),
            f"Students that differ only in how many {items} the teacher answered, trained equally "
            "long. Dashed: the best-fitting power law with a constant.",
        )
    if "size" in laws:
        label = "the student's share of the teacher's parameters"
        found["How large a student"] = (
            scaling(result, laws["size"], label, colours),
            "Students that differ only in size, at the same FLOPs: small ones train for many "
            "steps, large ones for few. Dashed: the best-fitting sum of two power laws, one that "
            "falls with size (the capacity gap) and one that rises (too few steps).",
        )
    return found


def reasoning_figures(result: dict[str, Any], colours: dict[str, str]) -> Figures:
    """Figures of a task whose solutions have steps."""
    found = {
        "Accuracy by number of steps": (
            accuracy_by_steps(result, colours),
            "Right answers to held-out problems. All students cost the same FLOPs"
            f"{smaller_budgets(result)}.",
        ),
        "Test-time scaling": (
            thinking_longer(result, colours),
            "Solid: the reasoning is cut after a number of tokens and an answer is forced. Dashed: "
            "the majority of 1, 4, 16 and 64 sampled answers. First seed of every model, 100 "
            "problems each.",
        ),
        "Where traces go wrong": (
            first_wrong_steps(result, colours),
            "The remaining traces have no wrong step. First seed of every model.",
        ),
    }
    if result["map"]:
        found["Where traces pay"] = (
            where_traces_pay(result),
            "By how many points of right answers a student trained on traces is ahead (blue; red: "
            "behind) of one trained only on answers, with the same size (thousands of parameters), "
            "number of problems and FLOPs (in % of the teacher's). ?: not distinguished, all "
            "cells corrected together. Chains of one or two steps also occur inside training "
            "traces, but not in answers without traces.",
        )
    return found


def smaller_budgets(result: dict[str, Any]) -> str:
    """`, except those with a smaller share of it: warm`, if there are any."""
    students = result["students"].items()
    smaller = [n for n, entry in students if entry["recipe"]["student"]["budget_fraction"] < 1]
    return f", except those with a smaller share of it: {', '.join(smaller)}" if smaller else ""


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
    reference: TeacherReference, first: dict[str, Evaluation], names: list[str]
) -> list[dict[str, Any]]:
    """All rows, sorted by id (a hash): the question, the answers, the right answers. Where the task
    does not grade answers as right or wrong, all count as right."""
    task, rows = reference.task, reference.rows

    def is_wrong(evaluation: Evaluation, i: int) -> bool:
        return "wrong" in evaluation.columns and bool(evaluation.columns["wrong"][i])

    return [
        {
            "question": task.question(rows, i),
            "image": image_of(task, rows, i),
            "listed": task.truths(task.question(rows, i)),
            "right": not is_wrong(reference.evaluation, i),
            **{name: first[name].answers.texts[i] for name in names},
            "wrong": {name: is_wrong(first[name], i) for name in names},
        }
        for i in np.argsort(rows.ids)
    ]


def image_of(task: Task, rows: Rows, i: int) -> str | None:
    """The image of a row, as a PNG data URI."""
    pixels = task.image(rows, i)
    if pixels is None:
        return None
    buffer = io.BytesIO()
    matplotlib.image.imsave(buffer, pixels, cmap="gray_r", vmin=0, vmax=255, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def dark_knowledge(reference: TeacherReference) -> list[dict[str, Any]]:
    """The rows that the teacher is least certain of, with its most likely tokens per position."""
    task, rows = reference.task, reference.rows
    if not reference.compares_tokens:
        return []
    columns = reference.evaluation.columns
    uncertainty = columns["entropy"] / columns["positions"]
    shown = []
    for i in np.argsort(uncertainty, kind="stable")[::-1][:UNCERTAIN]:
        logits, _, _ = completion_logits(reference.teacher, task, rows, np.array([i]))
        top = torch.softmax(logits, dim=-1).topk(min(5, task.vocabulary), dim=-1)
        positions = [
            {
                "target": task.token_name(target),
                "top": [
                    (task.token_name(token), p) for token, p in zip(tokens, shares, strict=True)
                ],
            }
            for target, tokens, shares in zip(
                rows.completion(i), top.indices.tolist(), top.values.tolist(), strict=True
            )
        ]
        question, image = task.question(rows, i), image_of(task, rows, i)
        shown.append({"question": question, "image": image, "positions": positions})
    return shown


def render_check(result: dict[str, Any], reference: dict[str, Any], lines: list[str]) -> str:
    """HTML of a check: its lines, and every metric against the band of the committed seeds."""
    bands = reference.get("bands") or {}
    return template("check.html").render(
        name=result["config"]["name"],
        lines=lines,
        seeds=max((len(band["values"]) for band in bands.values()), default=0),
        image=strips(per_seed_values(result), bands) if bands else None,
    )
