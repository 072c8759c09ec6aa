"""The figures of the report: drawn from eval.json and the log of a run, as SVG."""

import base64
import io
from typing import Any

import matplotlib as mpl
import numpy as np

from measure.evaluate import Evaluation
from measure.fidelity import ECE_BINS
from measure.laws import Law, students_differing_in
from measure.metrics import CALIBRATION, DIVERGENCE, metrics_in
from measure.report.tables import (
    by_split,
    fidelity_shown,
    heading,
    in_a_cell,
    models_in,
    task_of,
    value_in,
)
from tasks.task import Task

mpl.use("Agg")
import matplotlib.pyplot as plt

COST = {"flops": "FLOPs", "seconds": "time"}
ACCESS_KEYS = ("access", "outputs.k")
TEACHERS = ("teacher", "second_teacher")
MANY = 12  # models in one plot; with more, each gets its own plot
# A legend beside the axes, where it does not cover the lines.
BESIDE = {"frameon": False, "fontsize": 8, "loc": "center left", "bbox_to_anchor": (1.02, 0.5)}


def learning_curves(log: list[dict[str, Any]], colours: dict[str, str]) -> str:
    """Validation loss against training FLOPs, a line per seed. With many models each has its own
    plot, with the teacher and the first student in grey for comparison."""
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for line in log:
        if "validation_nll" in line:
            stage = line["stage"]
            name = stage.split("/")[1] if "/" in stage else stage
            points = curves.setdefault(name, {}).setdefault(stage, [])
            points.append((line["flops"], line["validation_nll"]))

    def draw(axes: plt.Axes, name: str, **style: Any) -> None:
        for number, points in enumerate(curves.get(name, {}).values()):
            axes.plot(*zip(*points, strict=True), label=None if number else name, **style)

    if len(curves) <= MANY:
        figure, axes = plt.subplots(figsize=(7, 4))
        for name in curves:
            draw(axes, name, color=colours[name], lw=1.4)
        axes.set(xscale="log", yscale="log")
        axes.set(xlabel="training FLOPs", ylabel="validation loss (nats)")
        axes.legend(frameon=False)
        return picture(figure)
    columns, first = 5, next(name for name in curves if name not in TEACHERS)
    rows = -(-len(curves) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(11, 1.7 * rows), sharex=True, sharey=True)
    for axes, name in zip(grid.flat, curves, strict=False):
        for other in ("teacher", first):
            draw(axes, other, color="#bbb", lw=0.8)
        draw(axes, name, color="#1b6ca8", lw=1.2)
        axes.set(xscale="log", yscale="log")
        axes.set_title(name, fontsize=8)
    for axes in grid.flat[len(curves) :]:
        axes.axis("off")
    figure.supxlabel("training FLOPs", fontsize=9)
    figure.supylabel("validation loss (nats)", fontsize=9)
    return picture(figure)


def fidelity_against_cost(result: dict[str, Any], colours: dict[str, str], key: str) -> str:
    """What each model cost, its outputs included, in % of the teacher's training FLOPs or seconds;
    and the Pareto front. A second teacher costs as much as the first."""
    models = models_in(result)
    figure, axes = plt.subplots(figsize=(7, max(4, 0.2 * len(models))))
    shares = result["cost"]["fraction_of_teacher_by_student"]
    shown = fidelity_shown(result)
    metric, points = metrics_in(result)[shown], []
    for name, entry in models.items():
        value = value_in(entry, shown)
        if value is None:
            continue
        x = 100 * shares[name][key] if name in shares else 100.0
        y, low, high = (metric.scale * number for number in (value["mean"], *value["ci95"]))
        axes.errorbar(x, y, yerr=[[y - low], [high - y]], fmt="o", color=colours[name], capsize=3)
        points.append((y, x, name))
    front = pareto_front([(x, y) for y, x, _ in points], metric.sign)
    axes.plot(*zip(*front, strict=True), color="#999", lw=1, ls="--", zorder=0)
    spread_labels(axes, points)
    axes.set(xlabel=f"% of the teacher's training {COST[key]}", ylabel=heading(metric))
    axes.set(xscale="log", xlim=(min(x for _, x, _ in points) / 1.6, 250))
    ticks = [1, 2, 5, 10, 20, 50, 100]
    axes.set_xticks(ticks, labels=map(str, ticks))
    axes.minorticks_off()
    return picture(figure)


def quality_against_cost(result: dict[str, Any], name: str) -> str:
    """A curve for each kind of student over its budgets, with intervals; the teacher, dashed."""
    metric, costs = metrics_in(result)[name], result["cost"]["fraction_of_teacher_by_student"]
    figure, axes = plt.subplots(figsize=(7, 4.2))
    for kind, students in result["savings"]["curves"].items():
        values = [value_in(result["students"][student], name) for student in students]
        middle = np.array([metric.scale * value["mean"] for value in values])
        ends = metric.scale * np.array([value["ci95"] for value in values])
        x = [100 * costs[student]["flops"] for student in students]
        axes.errorbar(x, middle, np.abs(ends - middle[:, None]).T, fmt="o-", ms=4, capsize=2,
            label=kind)  # fmt: skip
    teacher = value_in(result["teacher"], name)
    if teacher and not metric.needs_teacher:
        axes.axhline(metric.scale * teacher["mean"], color="#888", ls="--", lw=1, label="teacher")
    axes.set(xscale="log", xlabel="% of the teacher's training FLOPs", ylabel=heading(metric))
    axes.legend(**BESIDE)
    return picture(figure)


def pareto_front(points: list[tuple[float, float]], sign: int) -> list[tuple[float, float]]:
    """The points (cost, fidelity) that no point of at most the same cost exceeds, by cost. sign: -1
    if lower is better."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -sign * point[1])):
        if not front or sign * y > sign * front[-1][1]:
            front.append((x, y))
    return front


def spread_labels(axes: plt.Axes, points: list[tuple[float, float, str]]) -> None:
    """Label points (y, x, name) in a column on the right, sorted by y and at least a line of text
    apart, with a leader line to each point."""
    points = sorted(points)
    low, high = axes.get_ylim()
    height = axes.figure.get_size_inches()[1]
    line = 0.16 * (high - low) / height  # inches
    places = np.array([y for y, _, _ in points])
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + line)
    top = high - line * np.arange(len(places))[::-1]
    for (y, x, name), place in zip(points, np.minimum(places, top), strict=True):
        axes.annotate(
            name, (x, y), xytext=(1.03, place), textcoords=axes.get_yaxis_transform(),
            fontsize=7, va="center", arrowprops={"arrowstyle": "-", "lw": 0.4, "color": "#999"},
        )  # fmt: skip
    axes.set_ylim(low, high)


def bytes_against_kl(result: dict[str, Any], colours: dict[str, str]) -> str:
    """KL to the teacher against bytes per token of the outputs, for recipes that differ only in
    access."""
    figure, axes = plt.subplots(figsize=(7, 4))
    weights = {a: s["bytes_per_token"] for a, s in result["cost"]["outputs_by_student"].items()}
    points = []
    for name in students_differing_in(result, ACCESS_KEYS):
        metric = result["students"][name]["fidelity"][DIVERGENCE]
        y, (low, high) = metric["mean"], metric["ci95"]
        error = [[y - low], [high - y]]
        axes.errorbar(weights[name], y, yerr=error, fmt="o", color=colours[name], capsize=3)
        points.append((y, weights[name], name))
    spread_labels(axes, points)
    axes.set(xscale="log", xlabel="bytes per token of the outputs", ylabel="KL to teacher, nats")
    return picture(figure)


def scaling(
    result: dict[str, Any], study: dict[str, Any], label: str, colours: dict[str, str]
) -> str:
    """KL to the teacher against x, with the fitted law."""
    figure, axes = plt.subplots(figsize=(7, 4))
    points = []
    for name, x in study["x"].items():
        metric = result["students"][name]["fidelity"][DIVERGENCE]
        y, (low, high) = metric["mean"], metric["ci95"]
        axes.errorbar(x, y, yerr=[[y - low], [high - y]], fmt="o", color=colours[name], capsize=3)
        points.append((x, y, name))
    for x, y, name in points:
        axes.annotate(name, (x, y), xytext=(6, 5), textcoords="offset points", fontsize=7)
    if study["law"]:
        law, along = Law(*study["law"]), np.geomspace(min(points)[0], max(points)[0], 100)
        axes.plot(along, law(along), color="#999", lw=1, ls="--", zorder=0)
        axes.set_title(f"KL = {law}", fontsize=9)
    axes.set(xscale="log", yscale="log", xlabel=label, ylabel="KL to teacher, nats")
    axes.margins(x=0.12)
    return picture(figure)


def fidelity_by_temperature(result: dict[str, Any]) -> str:
    """Fidelity against temperature, for recipes that differ only in temperature."""
    figure, axes = plt.subplots(figsize=(7, 4))
    students, names = result["students"], students_differing_in(result, ("temperature",))
    found = sorted((students[name]["recipe"]["temperature"], name) for name in names)
    shown = fidelity_shown(result)
    metric, temperatures = metrics_in(result)[shown], [value for value, _ in found]
    values = [value_in(students[name], shown) for _, name in found]
    means = [metric.scale * value["mean"] for value in values]
    bounds = [[metric.scale * bound for bound in value["ci95"]] for value in values]
    error = [
        [mean - low for mean, (low, _) in zip(means, bounds, strict=True)],
        [high - mean for mean, (_, high) in zip(means, bounds, strict=True)],
    ]
    axes.errorbar(temperatures, means, yerr=error, marker="o", capsize=3, color="#1b6ca8")
    axes.set(xscale="log", xlabel="temperature", ylabel=heading(metric))
    axes.set_xticks(temperatures, labels=[f"{value:g}" for value in temperatures])
    axes.minorticks_off()
    return picture(figure)


def accuracy_by_steps(result: dict[str, Any], colours: dict[str, str]) -> str:
    """Right answers by number of steps; the later splits have more steps than in training."""
    task = task_of(result)
    figure, axes = plt.subplots(figsize=(8.2, 4.4))
    for name, entry in models_in(result).items():
        quality: dict[str, Any] = {}
        for values in by_split(entry, result).values():
            quality = values.get("quality", {}) | quality
        numbers = [n for n in all_steps(task) if task.accuracy_at(n) in quality]
        metrics = [quality[task.accuracy_at(n)] for n in numbers]
        means = [100 * metric["mean"] for metric in metrics]
        bounds = [[100 * bound for bound in metric["ci95"]] for metric in metrics]
        error = [
            [max(0, m - low) for m, (low, _) in zip(means, bounds, strict=True)],
            [max(0, high - m) for m, (_, high) in zip(means, bounds, strict=True)],
        ]
        axes.errorbar(
            numbers, means, yerr=error, marker="o", ms=3, capsize=2, lw=1.2,
            color=colours[name], label=name,
        )  # fmt: skip
    trained = max(task.steps[task.evaluation_splits[0]])
    axes.axvspan(trained + 0.5, max(all_steps(task)) + 0.3, color="#999", alpha=0.12, lw=0)
    axes.set(xlabel="steps of the problem (grey: more than in training)", ylabel="right answers %")
    axes.legend(**BESIDE)
    return picture(figure)


def all_steps(task: type[Task]) -> list[int]:
    return sorted({n for steps in task.steps.values() for n in steps})


def thinking_longer(result: dict[str, Any], colours: dict[str, str]) -> str:
    """Right answers against tokens and FLOPs per problem, for longer reasoning and more votes; a
    row of plots per split."""
    task = task_of(result)
    models = {n: e["reasoning"] for n, e in models_in(result).items() if "reasoning" in e}
    first, *others = (split for split in task.evaluation_splits if task.steps.get(split))
    rows = {first: models}
    for split in others:
        rows[split] = {name: curves[split] for name, curves in models.items() if split in curves}
    size = (11, 3.7 * len(rows))
    figure, grid = plt.subplots(
        len(rows), 2, figsize=size, sharex="col", sharey="row", squeeze=False
    )
    keys = ("tokens_per_problem", "flops_per_problem")
    for (split, curves), row in zip(rows.items(), grid, strict=True):
        for axes, key in zip(row, keys, strict=True):
            for name, by_kind in curves.items():
                for kind, style in (("thinking", "o-"), ("voting", "s--")):
                    line(axes, by_kind[kind] or [], key, style, colours[name], name)
            axes.set(xscale="log", ylim=(-3, 103))
        steps = task.steps[split]
        row[0].set_ylabel(f"right answers %, {min(steps)} to {max(steps)} steps")
    for axes, key in zip(grid[-1], keys, strict=True):
        axes.set_xlabel(key.replace("_", " ").replace("flops", "FLOPs"))
    handles, labels = grid[0][1].get_legend_handles_labels()
    grid[0][1].legend(handles[1::2], labels[1::2], **BESIDE)  # every model has two
    return picture(figure)


def line(
    axes: plt.Axes, points: list[dict[str, Any]], key: str, style: str, colour: str, name: str
) -> None:
    """A curve of test-time scaling, with its intervals."""
    y, ends = [100 * p["accuracy"] for p in points], [p["ci95"] for p in points]
    error = [
        [max(0.0, here - 100 * low) for here, (low, _) in zip(y, ends, strict=True)],
        [max(0.0, 100 * high - here) for here, (_, high) in zip(y, ends, strict=True)],
    ]
    axes.errorbar(
        [p[key] for p in points], y, yerr=error if points else None, fmt=style, ms=3, lw=1.2,
        elinewidth=0.5, color=colour, label=name,
    )  # fmt: skip


def first_wrong_steps(result: dict[str, Any], colours: dict[str, str]) -> str:
    """At which step a trace first goes wrong, in % of the longest problems seen in training."""
    task = task_of(result)
    longest = max(task.steps[task.evaluation_splits[0]])
    figure, axes = plt.subplots(figsize=(8.2, 4.4))
    histograms = {
        name: entry["reasoning"]["first_wrong_step"][str(longest)]
        for name, entry in models_in(result).items()
        if entry.get("reasoning", {}).get("first_wrong_step")
    }
    width = 0.8 / max(1, len(histograms))
    for place, (name, counts) in enumerate(histograms.items()):
        at = np.arange(1, len(counts)) + (place - len(histograms) / 2 + 0.5) * width
        shares = 100 * np.array(counts[1:]) / sum(counts)
        axes.bar(at, shares, width, color=colours[name], label=name)
    axes.set_xticks(
        range(1, longest + 2), labels=[*map(str, range(1, longest + 1)), "one too many"]
    )
    axes.set(xlabel="first wrong step", ylabel=f"% of the problems of {longest} steps")
    axes.legend(**BESIDE)
    return picture(figure)


def where_traces_pay(result: dict[str, Any]) -> str:
    """A map: what traces gain over only their answers at equal FLOPs, in points of right answers,
    by pair of students and number of steps."""
    task = task_of(result)
    students, shares = result["students"], result["cost"]["fraction_of_teacher_by_student"]
    cells = {(cell["claim"], cell["steps"]): cell for cell in result["map"]}
    claims = list(dict.fromkeys(cell["claim"] for cell in result["map"]))
    steps = [n for n in all_steps(task) if (claims[0], n) in cells]
    gains = np.array([[100 * cells[claim, n]["difference"] for n in steps] for claim in claims])
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.45 * len(claims)))
    axes.imshow(gains, cmap="RdBu", vmin=-100, vmax=100, aspect="auto")
    for (row, column), gain in np.ndenumerate(gains):
        unsure = "?" if in_a_cell(cells[claims[row], steps[column]]) == "?" else ""
        colour = "white" if abs(gain) > 60 else "black"
        text = f"{gain:+.0f} {unsure}".strip()
        axes.text(column, row, text, ha="center", va="center", fontsize=9, color=colour)
    labels = []
    for claim in claims:
        name, _, other = claim.split()
        cost = 100 * shares[name]["flops"]
        size = students[name]["params"] / 1000
        rows = result["cost"]["outputs_by_student"][name]["rows"]
        labels.append(f"{name} over {other} ({size:.0f} k, {rows:,}, {cost:.1f} %)")
    trained = max(task.steps[task.evaluation_splits[0]])
    axes.axvline(steps.index(trained) + 0.5, color="#555", lw=1)
    axes.set_yticks(range(len(claims)), labels=labels, fontsize=8)
    axes.set_xticks(range(len(steps)), labels=steps)
    axes.set_xlabel("steps of the problem (right of the line: more than in training)")
    return picture(figure)


def strips(found: dict[str, list[float]], bands: dict[str, Any]) -> str:
    """A row per metric, in units of its band: the committed seeds in grey, this run in blue."""
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


def reliability(first: dict[str, Evaluation], colours: dict[str, str]) -> str:
    """Accuracy against confidence, for the first MANY models."""
    figure, axes = plt.subplots(figsize=(6.4, 4.4))
    axes.plot([0, 1], [0, 1], color="#999", lw=1, ls="--")
    for name, evaluation in list(first.items())[:MANY]:
        count, confidence, hits = np.split(evaluation.columns[CALIBRATION].sum(0), 3)
        filled = count > 0
        axes.plot(
            confidence[filled] / count[filled],
            hits[filled] / count[filled],
            marker="o",
            ms=3,
            lw=1.2,
            color=colours[name],
            label=name,
        )
    axes.set(xlabel=f"confidence ({ECE_BINS} bins)", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    axes.legend(**BESIDE)
    return picture(figure)


def picture(figure: plt.Figure) -> str:
    """A figure as an SVG data URI; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "lab", "svg.fonttype": "none"}):
        figure.tight_layout()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
