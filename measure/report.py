"""The report: one self-contained HTML file for people who would rather look than read.

Reads a finished run's files and what the evaluation handed over; computes no metric of its own.
"""

import base64
import io
import itertools
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
import numpy as np
import torch

from configs.runs import Run
from measure.fidelity import ECE_BINS
from measure.judged import Judged, Reference
from measure.tables import COLUMNS, arms_in, cells_of, facts_of

mpl.use("Agg")
import matplotlib.pyplot as plt

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
    splits = {"held-out words": arms}
    if "long" in result["teacher"]:
        splits["long words"] = {arm: {**entry, **entry["long"]} for arm, entry in arms.items()}
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    )
    return template.render(
        name=result["config"]["name"],
        main=main,
        result=result,
        facts=facts_of(result),
        headings=["parameters", "TFLOPs", *COLUMNS, "ms per answer", "answers per s"],
        tables={
            title: {arm: report_cells(entry) for arm, entry in entries.items()}
            for title, entries in splits.items()
        },
        figures={
            "Learning curves": (
                learning_curves(run, colours),
                "Validation loss in nats per phoneme while training, against the FLOPs spent. "
                "One line per seed.",
            ),
            "Fidelity against cost": (
                fidelity_against_cost(result, arms, colours),
                "How often a student gives the teacher's very own answer, against what it cost, "
                "its outputs included. All arms have the same budget by design.",
            ),
            "Reliability": (
                reliability(first, colours),
                "When a model is this sure of a phoneme, how often is it right? The diagonal is "
                "perfect calibration.",
            ),
        },
        arms=shown,
        differ=[a for a in answers if a["teacher"] != a[main]][:EXAMPLES],
        copied=[a for a in answers if a["teacher"] == a[main] and not a["right"]][:EXAMPLES],
        knowledge=dark_knowledge(reference),
    )


def report_cells(entry: dict[str, Any]) -> list[str]:
    cost = entry["cost"]
    return [
        f"{entry['params']:,}",
        f"{cost['flops'] / 1e12:.2f}",
        *cells_of(entry, COLUMNS, interval=True),
        f"{cost['latency_ms']:.1f}",
        f"{cost['answers_per_second']:.0f}",
    ]


def side_by_side(
    reference: Reference, first: dict[str, Judged], arms: list[str]
) -> list[dict[str, Any]]:
    """Every row in the order of its id (a hash): the word, the answers, what is listed."""
    task, rows = reference.task, reference.rows
    right = reference.judged.columns["wrong"] == 0
    return [
        {
            "word": task.question(rows, i),
            "listed": task.words[task.question(rows, i)],
            "right": bool(right[i]),
            **{arm: first[arm].answers.texts[i] for arm in arms},
        }
        for i in np.argsort(rows.ids)
    ]


def dark_knowledge(reference: Reference) -> list[dict[str, Any]]:
    """The words that the teacher is least sure of, with its likeliest tokens at each position."""
    task, rows = reference.task, reference.rows
    log_probs = torch.log_softmax(reference.logits, dim=-1)
    by_row = log_probs.split((rows.lengths - rows.prompt_lengths).tolist())
    entropy = [float(-(p.exp() * p).sum(-1).mean()) for p in by_row]
    shown = []
    for i in np.argsort(entropy, kind="stable")[::-1][:SHOWN_WORDS]:
        top = by_row[i].exp().topk(5, dim=-1)
        positions = [
            {
                "target": task.tokens[target],
                "top": [(task.tokens[t], p) for t, p in zip(likeliest, chances, strict=True)],
            }
            for target, likeliest, chances in zip(
                rows.completion(i), top.indices.tolist(), top.values.tolist(), strict=True
            )
        ]
        shown.append({"word": task.question(rows, i), "positions": positions})
    return shown


def learning_curves(run: Run, colours: dict[str, str]) -> str:
    figure, axes = plt.subplots(figsize=(7, 4))
    curves: dict[str, list[tuple[float, float]]] = {}
    for line in run.metrics():
        if "validation_nll" in line:
            curves.setdefault(line["stage"], []).append((line["flops"], line["validation_nll"]))
    labelled = set()
    for stage, points in curves.items():
        arm = stage.split("/")[1] if "/" in stage else stage
        label = None if arm in labelled else arm
        labelled.add(arm)
        axes.plot(*zip(*points, strict=True), color=colours[arm], label=label, lw=1.4)
    axes.set(xscale="log", yscale="log", xlabel="training FLOPs", ylabel="validation loss (nats)")
    axes.legend(frameon=False)
    return picture(figure)


def fidelity_against_cost(
    result: dict[str, Any], arms: dict[str, Any], colours: dict[str, str]
) -> str:
    figure, axes = plt.subplots(figsize=(7, 4))
    shares = result["cost"]["fraction_of_teacher_by_student"]
    for arm, entry in arms.items():
        metric = entry["fidelity"].get("sequence_agreement")
        if metric is None:
            continue
        if arm not in shares:  # the twin cost what the teacher cost: a level to compare with
            axes.axhline(100 * metric["mean"], color=colours[arm], lw=1, ls="--")
            axes.annotate(
                f"{arm} (a second teacher)",
                (0.02, 100 * metric["mean"]),
                xytext=(0, 4),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
            )
            continue
        x = 100 * shares[arm]["flops"]
        y = 100 * metric["mean"]
        error = [[y - 100 * metric["ci95"][0]], [100 * metric["ci95"][1] - y]]
        axes.errorbar(x, y, yerr=error, fmt="o", color=colours[arm], capsize=3)
        axes.annotate(arm, (x, y), xytext=(6, 4), textcoords="offset points")
    axes.set(xlabel="% of the teacher's training FLOPs", ylabel="same answer %")
    axes.set_xlim(left=0)
    return picture(figure)


def reliability(first: dict[str, Judged], colours: dict[str, str]) -> str:
    figure, axes = plt.subplots(figsize=(5, 4.4))
    axes.plot([0, 1], [0, 1], color="#999", lw=1, ls="--")
    for arm, judged in first.items():
        count, confidence, hits = np.split(judged.columns["calibration"].sum(0), 3)
        filled = count > 0
        axes.plot(
            confidence[filled] / count[filled],
            hits[filled] / count[filled],
            marker="o",
            ms=3,
            lw=1.2,
            color=colours[arm],
            label=arm,
        )
    axes.set(xlabel=f"confidence ({ECE_BINS} bins)", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    axes.legend(frameon=False)
    return picture(figure)


def picture(figure: plt.Figure) -> str:
    """A figure as an SVG data address, the same bytes for the same figure."""
    buffer = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "lab", "svg.fonttype": "none"}):
        figure.tight_layout()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
