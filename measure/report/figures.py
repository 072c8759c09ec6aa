"""The figures of every report: claims, cost, learning curves, calibration, checks."""

from typing import Any

import numpy as np
from matplotlib.ticker import NullFormatter

from measure.evaluate import Evaluation
from measure.metrics import CALIBRATION, metrics_in
from measure.report.drawing import (
    GREY,
    INK,
    SERIES,
    WIDTH,
    Styles,
    add_legend,
    draw_intervals,
    drawn,
    plain_ticks,
    plt,
    subplots,
)
from measure.report.tables import fidelity_shown, heading, models_in, value_in
from tasks.task import Metric

COST = {"flops": "FLOPs", "seconds": "seconds"}
TEACHERS = ("teacher", "second_teacher")
MANY = 12  # models in one plot; with more, each gets its own plot
BETTER, WORSE = SERIES[0], SERIES[1]


def forest(result: dict[str, Any]) -> dict[str, str]:
    """{title: figure}: for each metric, by how much a student is better than another model, with
    95 % intervals; behind it, as strokes, the committed runs of the same config."""
    claims = [(v["claim"].split(), v) for v in result["verdicts"]]
    verdicts = [
        v for (name, verb, _), v in claims if verb == "beats" and name in result["students"]
    ]
    many = len({v["claim"] for v in verdicts}) > 2 * MANY
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for verdict in verdicts:
        against = f", against {verdict['claim'].split()[2]}" if many else ""
        groups.setdefault((verdict["metric"], against), []).append(verdict)
    metrics = metrics_in(result)
    return {
        f"{metrics[name].heading}{against}": claims_drawn(found, metrics[name], against)
        for (name, against), found in groups.items()
    }


def claims_drawn(verdicts: list[dict[str, Any]], metric: Metric, against: str) -> str:
    """A row per claim about one metric. against: what all rows have in common, in the title."""
    figure, axes = subplots(size=(WIDTH, 0.65 + 0.25 * len(verdicts)))
    axes.axvline(0, color=GREY, lw=1)
    for row, verdict in enumerate(verdicts):
        committed = metric.scale * np.array(verdict.get("committed", {}).get("values", []))
        axes.plot(committed, np.full(len(committed), row), "|", color=GREY, ms=9, mew=0.8)
        outcome = verdict["here"] or verdict["result"]
        colour, marker = {"better": (BETTER, "o"), "worse": (WORSE, "D")}.get(outcome, (INK, "s"))
        axes.plot(metric.scale * np.array(verdict["ci95"]), [row, row], color=colour, lw=1.6)
        axes.plot(
            metric.scale * verdict["difference"], row, marker, color=colour, ms=5,
            markerfacecolor="none" if marker == "s" else colour,
        )  # fmt: skip
        if verdict["threshold"]:
            axes.plot(metric.scale * verdict["threshold"], row, "2", color=INK, ms=9)
    axes.set_yticks(range(len(verdicts)), labels=[label_of(v, against) for v in verdicts])
    axes.set(ylim=(len(verdicts) - 0.5, -0.7))
    left, right = "\N{LEFTWARDS ARROW} worse", "better \N{RIGHTWARDS ARROW}"
    axes.set_xlabel(f"{left}\N{EM SPACE}{metric.difference_unit}\N{EM SPACE}{right}")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return drawn(figure, f"{len(verdicts)} claims about {metric.heading}, with 95 % intervals")


def label_of(verdict: dict[str, Any], against: str) -> str:
    first, _, second = verdict["claim"].split()
    split = "" if verdict["split"] in ("heldout", "validation") else f", {verdict['split']}"
    return f"{first}{split}" if against else f"{first} against {second}{split}"


def cost_bars(result: dict[str, Any], key: str) -> str:
    """What each model cost, in % of the teacher's training: its own, and what it needs first."""
    shares = result["cost"]["fraction_of_teacher_by_student"]
    models, teacher = models_in(result), result["teacher"]["cost"][key]
    names = [n for n in models if n in shares and shares[n][key] is not None]
    figure, axes = subplots(size=(WIDTH, 0.7 + 0.22 * (len(names) + 1)))
    total = np.array([100 * shares[name][key] for name in names])
    training = np.array([100 * models[name]["cost"][key] / teacher for name in names])
    training = np.minimum(training, total)
    rows = np.arange(1, len(names) + 1)
    axes.barh(0, 100, color=GREY, height=0.6)
    axes.barh(rows, training, color=SERIES[0], height=0.6, label="training")
    axes.barh(
        rows, total - training, left=training, color="none", edgecolor=SERIES[1], hatch="/////",
        height=0.6, lw=0, label="needed first: outputs, other students",
    )  # fmt: skip
    for row, value in zip(rows, total, strict=True):
        axes.text(value + 1.5, row, f"{value:.0f} %", va="center", fontsize=8)
    axes.set_yticks(range(len(names) + 1), labels=["teacher", *names])
    axes.set(xlabel=f"% of the teacher's training {COST[key]}", ylim=(len(names) + 0.6, -0.6))
    add_legend(figure, axes)
    return drawn(figure, f"{COST[key]} of each model, outputs included, in % of the teacher's")


def learning_curves(log: list[dict[str, Any]], styles: Styles) -> str:
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

    curves = {name: curves[name] for name in styles if name in curves}
    label = "validation loss in nats against training FLOPs"
    if len(curves) <= MANY:
        figure, axes = subplots()
        for name in curves:
            draw(axes, name, **styles[name], markevery=0.25)
        axes.set(xscale="log", yscale="log")
        axes.set(xlabel="training FLOPs", ylabel="validation loss (nats)")
        plain_ticks(axes.yaxis)
        add_legend(figure, axes)
        return drawn(figure, label)
    columns, first = 5, next(name for name in curves if name not in TEACHERS)
    rows = -(-len(curves) // columns)
    figure, grid = subplots(rows, columns, size=(9, 1.5 * rows), sharex=True, sharey=True)
    for axes, name in zip(grid.flat, curves, strict=False):
        for other in ("teacher", first):
            draw(axes, other, color=GREY, lw=0.8)
        draw(axes, name, color=SERIES[0])
        axes.set(xscale="log", yscale="log", title=name)
        plain_ticks(axes.yaxis)
    for axes in grid.flat[len(curves) :]:
        axes.axis("off")
    figure.supxlabel("training FLOPs", fontsize=9)
    figure.supylabel("validation loss (nats)", fontsize=9)
    return drawn(figure, label)


def fidelity_against_cost(result: dict[str, Any], styles: Styles, key: str) -> str:
    """What each model cost, its outputs included, in % of the teacher's training FLOPs or seconds;
    and the Pareto front. A second teacher costs as much as the first."""
    models, shown = models_in(result), fidelity_shown(result)
    figure, axes = subplots(size=(WIDTH, max(3.2, 0.16 * len(models))))
    shares = result["cost"]["fraction_of_teacher_by_student"]
    metric, points = metrics_in(result)[shown], []
    for name, entry in models.items():
        value = value_in(entry, shown)
        if value is None:
            continue
        x = 100 * shares[name][key] if name in shares else 100.0
        draw_intervals(axes, [x], [value], metric.scale, **styles[name])
        points.append((metric.scale * value["mean"], x, name))
    front = pareto_front([(x, y) for y, x, _ in points], metric.sign)
    axes.plot(*zip(*front, strict=True), color=GREY, lw=1, ls="--", zorder=0)
    spread_labels(axes, points)
    axes.set(xlabel=f"% of the teacher's training {COST[key]}", ylabel=heading(metric))
    axes.set(xscale="log", xlim=(min(x for _, x, _ in points) / 1.6, 250))
    ticks = [1, 2, 5, 10, 20, 50, 100]
    axes.set_xticks(ticks, labels=map(str, ticks))
    axes.minorticks_off()
    return drawn(figure, f"{metric.heading} of each model against its {COST[key]}")


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
            fontsize=8, va="center", arrowprops={"arrowstyle": "-", "lw": 0.4, "color": GREY},
        )  # fmt: skip
    axes.set_ylim(low, high)


def reliability(evaluation: Evaluation, name: str) -> str:
    """How often a model is right at each level of confidence, and how many tokens it has there. The
    band holds 95 % of a perfectly calibrated model's bins: 1.96 binomial standard deviations."""
    count, confidence, hits = np.split(evaluation.columns[CALIBRATION].sum(0), 3)
    filled = count > 0
    count, hits = count[filled], hits[filled] / count[filled]
    confidence = np.clip(confidence[filled] / count, 0, 1)
    half = 1.96 * np.sqrt(confidence * (1 - confidence) / count)
    figure, (top, bottom) = subplots(
        2, 1, size=(WIDTH / 1.6, 3.0), sharex=True, height_ratios=(3, 1)
    )
    low, high = np.clip(confidence - half, 0, 1), np.clip(confidence + half, 0, 1)
    top.fill_between(confidence, low, high, color=GREY, alpha=0.35, lw=0)
    top.plot(confidence, confidence, color=GREY, lw=0.8)
    top.plot(confidence, hits, color=SERIES[0], marker="o")
    top.set(title=name, ylabel="share right", xlim=(0, 1.02), ylim=(0, 1.02))
    bottom.bar(confidence, count, width=0.04, color=SERIES[0], log=True)
    bottom.set(xlabel="confidence", ylabel="tokens")
    bottom.yaxis.set_minor_formatter(NullFormatter())
    return drawn(figure, f"{name}: share of right tokens against confidence, and how many tokens")


def strips(found: dict[str, list[float]], bands: dict[str, Any]) -> str:
    """A row per metric, in units of its band: the committed seeds as strokes, this run as circles,
    as diamonds where it is outside the band."""
    figure, axes = subplots(size=(1.6 * WIDTH, 0.8 + 0.2 * len(bands)))
    axes.axvspan(-1, 1, color=GREY, alpha=0.2, lw=0)
    for row, (key, band) in enumerate(bands.items()):
        middle, half = (band["high"] + band["low"]) / 2, (band["high"] - band["low"]) / 2 or 1
        seeds = (np.asarray(band["values"]) - middle) / half
        axes.plot(seeds, np.full(len(seeds), row), "|", color=GREY, ms=9)
        for here in (np.asarray(found[key]) - middle) / half:
            inside = abs(here) <= 1
            marker, colour = ("o", BETTER) if inside else ("D", WORSE)
            axes.plot(here, row, marker, color=colour, ms=5)
    labels = [key.replace("_", " ") for key in bands]
    axes.set_yticks(range(len(bands)), labels=labels, fontsize=7)
    axes.set(xlabel="distance from the middle of the band, in half-widths", ylim=(len(bands), -1))
    return drawn(figure, f"{len(bands)} metrics of this run against their bands")
