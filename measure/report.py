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
from measure.check import metrics_of
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
                "its outputs included. All students and controls have the same budget by design.",
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
    """Outputs and student in % of the teacher's training; a twin cost as much as the teacher."""
    figure, axes = plt.subplots(figsize=(7, 4))
    shares = result["cost"]["fraction_of_teacher_by_student"]
    points = []
    for arm, entry in arms.items():
        metric = entry["fidelity"].get("sequence_agreement")
        if metric is None:
            continue
        x, y = 100 * shares[arm]["flops"] if arm in shares else 100.0, 100 * metric["mean"]
        error = [[y - 100 * metric["ci95"][0]], [100 * metric["ci95"][1] - y]]
        axes.errorbar(x, y, yerr=error, fmt="o", color=colours[arm], capsize=3)
        points.append((y, x, arm))
    below = -np.inf
    reach = max(y for y, _, _ in points) or 1
    for y, x, arm in sorted(points):  # labels of arms that lie together are spread upwards
        below = max(y, below + 0.06 * reach)
        axes.annotate(arm, (x, below), xytext=(8, -4), textcoords="offset points")
    axes.set(xlabel="% of the teacher's training FLOPs", ylabel="same answer %", xscale="log")
    axes.set_xlim(1, 250)
    axes.set_xticks([1, 2, 5, 10, 20, 50, 100], labels=["1", "2", "5", "10", "20", "50", "100"])
    axes.minorticks_off()
    return picture(figure)


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


def strips(found: dict[str, list[float]], bands: dict[str, Any]) -> str:
    """A line per metric, in units of its band: grey the committed seeds, blue this run."""
    figure, axes = plt.subplots(figsize=(8, 0.6 + 0.24 * len(bands)))
    for row, (key, band) in enumerate(bands.items()):
        middle, half = (band["high"] + band["low"]) / 2, (band["high"] - band["low"]) / 2 or 1
        seeds = (np.asarray(band["values"]) - middle) / half
        axes.plot(seeds, np.full(len(seeds), row), "|", color="#888", ms=9)
        for here in (np.asarray(found[key]) - middle) / half:
            axes.plot(here, row, "o", color="#1b6ca8" if abs(here) <= 1 else "#b3261e", ms=5)
    axes.axvspan(-1, 1, color="#1b6ca8", alpha=0.08, lw=0)
    axes.set_yticks(range(len(bands)), labels=[key.replace("_", " ") for key in bands], fontsize=7)
    axes.invert_yaxis()
    axes.set(xlabel="distance from the middle of the band, in half-widths", ylim=(len(bands), -1))
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
