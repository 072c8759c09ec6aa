"""The report: one self-contained HTML file for people who would rather look than read.

Reads a finished run's files and what the evaluation handed over; computes no metric of its own.
"""

import base64
import io
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
import numpy as np

from configs.runs import Run
from measure.fidelity import ECE_BINS
from measure.statistics import verdict_line

mpl.use("Agg")
import matplotlib.pyplot as plt

COLOURS = ["#1b6ca8", "#d1495b", "#66a182", "#edae49", "#8d6a9f", "#30343f", "#00798c", "#c17c74"]
EXAMPLES = 24
SHOWN_WORDS = 4

QUALITY = {"word_error_rate": "word errors %", "phoneme_error_rate": "phoneme errors %"}
FIDELITY = {
    "sequence_agreement": "same answer %",
    "agreement_on_teacher_errors": "copied errors %",
    "top1_agreement": "top-1 agreement %",
    "ece": "ECE %",
    "kl_teacher_student": "KL(t,s) nats",
    "kl_student_teacher": "KL(s,t) nats",
    "nll_gap": "NLL gap nats",
}


def render_report(
    run: Run,
    result: dict[str, Any],
    calibration: dict[str, np.ndarray],
    answers: list[dict[str, Any]],
    knowledge: list[dict[str, Any]],
) -> str:
    """HTML. `calibration`: arm -> [3 * bins] column sums; `answers`: words where teacher and
    student differ or err alike; `knowledge`: the teacher's likeliest tokens on a few words."""
    arms = {"teacher": result["teacher"], **result["students"], **result["controls"]}
    colours = {arm: COLOURS[i % len(COLOURS)] for i, arm in enumerate(arms)}
    main = next(iter(result["students"]))
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    )
    return template.render(
        name=result["config"]["name"],
        main=main,
        result=result,
        verdicts=[verdict_line(verdict) for verdict in result["verdicts"]],
        tables={
            "held-out words": table(arms, None),
            **{f"{split} words": table(arms, split) for split in ("long",) if split in arms[main]},
        },
        figures={
            "Learning curves": (
                learning_curves(run, colours),
                "Validation loss in nats per phoneme while training, against the FLOPs spent. "
                "One line per seed.",
            ),
            "Fidelity against cost": (
                fidelity_against_cost(result, arms, colours),
                "How often student and teacher give the very same answer, against what the student "
                "cost in training, its outputs included, as a share of the teacher's FLOPs.",
            ),
            "Reliability": (
                reliability(calibration, colours),
                "When a model is this sure of a phoneme, how often is it right? The diagonal is "
                "perfect calibration.",
            ),
        },
        differ=[a for a in answers if a["teacher"] != a[main]][:EXAMPLES],
        copied=[a for a in answers if a["teacher"] == a[main] and not a["right"]][:EXAMPLES],
        arms=[arm for arm in answers[0] if arm in arms] if answers else [],
        knowledge=knowledge[:SHOWN_WORDS],
    )


def table(arms: dict[str, Any], split: str | None) -> dict[str, Any]:
    """Headings and cells with 95 % intervals, of one split."""
    rows = []
    for arm, entry in arms.items():
        found = entry[split] if split else entry
        cells = [f"{entry['params']:,}", f"{entry['cost']['flops'] / 1e12:.2f}"]
        for group, keys in (("quality", QUALITY), ("fidelity", FIDELITY)):
            for key, heading in keys.items():
                cells.append(cell(found.get(group, {}).get(key), heading))
        cells += [
            f"{entry['cost']['latency_ms']:.1f}",
            f"{entry['cost']['answers_per_second']:.0f}",
        ]
        rows.append((arm, cells))
    headings = ["parameters", "TFLOPs", *QUALITY.values(), *FIDELITY.values()]
    return {"headings": [*headings, "ms per answer", "answers per s"], "rows": rows}


def cell(metric: dict[str, Any] | None, heading: str) -> str:
    if metric is None:
        return "–"
    scale, digits = (100, 1) if "%" in heading else (1, 3)
    low, high = (scale * bound for bound in metric["ci95"])
    return f"{scale * metric['mean']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


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
        own = entry["cost"]["flops"] / result["teacher"]["cost"]["flops"]
        x = 100 * (shares[arm]["flops"] if arm in shares else own)
        y = 100 * metric["mean"]
        error = [[y - 100 * metric["ci95"][0]], [100 * metric["ci95"][1] - y]]
        axes.errorbar(x, y, yerr=error, fmt="o", color=colours[arm], capsize=3)
        axes.annotate(arm, (x, y), xytext=(6, 4), textcoords="offset points")
    axes.set(xscale="log", xlabel="% of the teacher's training FLOPs", ylabel="same answer %")
    return picture(figure)


def reliability(calibration: dict[str, np.ndarray], colours: dict[str, str]) -> str:
    figure, axes = plt.subplots(figsize=(5, 4.4))
    axes.plot([0, 1], [0, 1], color="#999", lw=1, ls="--")
    for arm, sums in calibration.items():
        count, confidence, hits = np.split(sums, 3)
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
