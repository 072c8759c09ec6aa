"""The figures of the report: drawn from eval.json and the log of a run, as SVG."""

import base64
import io
from typing import Any

import matplotlib as mpl
import numpy as np

from configs.runs import Run
from measure.fidelity import ECE_BINS
from measure.judged import Judged
from measure.laws import Law, alike
from measure.tables import OPINION

mpl.use("Agg")
import matplotlib.pyplot as plt

NAMES = {"flops": "FLOPs", "seconds": "time"}


MANY = 12  # arms in one plot; more of them get a plot each
# A legend beside the lines, which those of many arms would hide.
BESIDE = {"frameon": False, "fontsize": 8, "loc": "center left", "bbox_to_anchor": (1.02, 0.5)}


def learning_curves(run: Run, colours: dict[str, str]) -> str:
    """Validation loss against training FLOPs, a line per seed. Of many arms each has a plot of its
    own, with the teacher and the first student in grey to compare."""
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for line in run.metrics():
        if "validation_nll" in line:
            stage = line["stage"]
            arm = stage.split("/")[1] if "/" in stage else stage
            points = curves.setdefault(arm, {}).setdefault(stage, [])
            points.append((line["flops"], line["validation_nll"]))

    def draw(axes: plt.Axes, arm: str, **style: Any) -> None:
        for number, points in enumerate(curves.get(arm, {}).values()):
            axes.plot(*zip(*points, strict=True), label=None if number else arm, **style)

    if len(curves) <= MANY:
        figure, axes = plt.subplots(figsize=(7, 4))
        for arm in curves:
            draw(axes, arm, color=colours[arm], lw=1.4)
        axes.set(xscale="log", yscale="log")
        axes.set(xlabel="training FLOPs", ylabel="validation loss (nats)")
        axes.legend(frameon=False)
        return picture(figure)
    columns, first = 5, next(arm for arm in curves if arm not in ("teacher", "twin"))
    rows = -(-len(curves) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(11, 1.7 * rows), sharex=True, sharey=True)
    for axes, arm in zip(grid.flat, curves, strict=False):
        for other in ("teacher", first):
            draw(axes, other, color="#bbb", lw=0.8)
        draw(axes, arm, color="#1b6ca8", lw=1.2)
        axes.set(xscale="log", yscale="log")
        axes.set_title(arm, fontsize=8)
    for axes in grid.flat[len(curves) :]:
        axes.axis("off")
    figure.supxlabel("training FLOPs", fontsize=9)
    figure.supylabel("validation loss (nats)", fontsize=9)
    return picture(figure)


def fidelity_against_cost(
    result: dict[str, Any], arms: dict[str, Any], colours: dict[str, str], key: str
) -> str:
    """What each arm cost, its outputs included, in % of the teacher's training: of its FLOPs or its
    seconds. The front: nothing cheaper is as faithful. A twin costs as much as the teacher."""
    figure, axes = plt.subplots(figsize=(7, max(4, 0.2 * len(arms))))
    shares = result["cost"]["fraction_of_teacher_by_student"]
    points = []
    for arm, entry in arms.items():
        fidelity = entry["fidelity"]  # of whole answers, or of the numbers that they come to
        metric = fidelity.get("answer_agreement") or fidelity.get("sequence_agreement")
        if metric is None:
            continue
        x, y = 100 * shares[arm][key] if arm in shares else 100.0, 100 * metric["mean"]
        error = [[y - 100 * metric["ci95"][0]], [100 * metric["ci95"][1] - y]]
        axes.errorbar(x, y, yerr=error, fmt="o", color=colours[arm], capsize=3)
        points.append((y, x, arm))
    front = pareto_front([(x, y) for y, x, _ in points])
    axes.plot(*zip(*front, strict=True), color="#999", lw=1, ls="--", zorder=0)
    spread_labels(axes, points)
    axes.set(xlabel=f"% of the teacher's training {NAMES[key]}", ylabel="same answer %")
    axes.set(xscale="log", xlim=(min(x for _, x, _ in points) / 1.6, 250))
    ticks = [1, 2, 5, 10, 20, 50, 100]
    axes.set_xticks(ticks, labels=map(str, ticks))
    axes.minorticks_off()
    return picture(figure)


def pareto_front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (cost, worth), those that nothing cheaper or as cheap exceeds, by cost."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front


def spread_labels(axes: plt.Axes, points: list[tuple[float, float, str]]) -> None:
    """Names of points (y, x, name), in a column to the right in the order of y, with a line to
    each. No two are nearer to each other than a line of text."""
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


def bytes_against_kl(result: dict[str, Any], arms: dict[str, Any], colours: dict[str, str]) -> str:
    """How many bytes a token of the outputs takes, and how far the student ends from the teacher:
    for recipes that differ in access alone."""
    figure, axes = plt.subplots(figsize=(7, 4))
    weights = {a: s["bytes_per_token"] for a, s in result["cost"]["outputs_by_student"].items()}
    points = []
    for arm in alike(result, ("access", "k", "stored_as")):
        metric = arms[arm]["fidelity"]["kl_teacher_student"]
        y, (low, high) = metric["mean"], metric["ci95"]
        error = [[y - low], [high - y]]
        axes.errorbar(weights[arm], y, yerr=error, fmt="o", color=colours[arm], capsize=3)
        points.append((y, weights[arm], arm))
    spread_labels(axes, points)
    axes.set(xscale="log", xlabel="bytes per token of the outputs", ylabel="KL to teacher, nats")
    return picture(figure)


def scaling(
    arms: dict[str, Any], study: dict[str, Any], label: str, colours: dict[str, str]
) -> str:
    """KL to the teacher against how much of something there was, with the fitted law."""
    figure, axes = plt.subplots(figsize=(7, 4))
    points = []
    for arm, x in study["x"].items():
        metric = arms[arm]["fidelity"]["kl_teacher_student"]
        y, (low, high) = metric["mean"], metric["ci95"]
        axes.errorbar(x, y, yerr=[[y - low], [high - y]], fmt="o", color=colours[arm], capsize=3)
        points.append((x, y, arm))
    for x, y, arm in points:
        axes.annotate(arm, (x, y), xytext=(6, 5), textcoords="offset points", fontsize=7)
    if study["law"]:
        law, along = Law(*study["law"]), np.geomspace(min(points)[0], max(points)[0], 100)
        axes.plot(along, law(along), color="#999", lw=1, ls="--", zorder=0)
        axes.set_title(f"KL = {law}", fontsize=9)
    axes.set(xscale="log", yscale="log", xlabel=label, ylabel="KL to teacher, nats")
    axes.margins(x=0.12)
    return picture(figure)


def agreement_by_temperature(
    result: dict[str, Any], arms: dict[str, Any], colours: dict[str, str]
) -> str:
    """For recipes that differ in temperature alone."""
    figure, axes = plt.subplots(figsize=(7, 4))
    students, same = result["students"], alike(result, ("temperature",))
    found = sorted((students[arm]["recipe"]["temperature"], arm) for arm in same)
    metrics = [arms[arm]["fidelity"]["sequence_agreement"] for _, arm in found]
    heats, means = [heat for heat, _ in found], [100 * metric["mean"] for metric in metrics]
    error = [
        [100 * (m["mean"] - m["ci95"][0]) for m in metrics],
        [100 * (m["ci95"][1] - m["mean"]) for m in metrics],
    ]
    axes.errorbar(heats, means, yerr=error, marker="o", capsize=3, color="#1b6ca8")
    axes.set(xscale="log", xlabel="temperature", ylabel="same answer %")
    axes.set_xticks(heats, labels=[f"{heat:g}" for heat in heats])
    axes.minorticks_off()
    return picture(figure)


STEPS = range(1, 9)  # of the problems of task reason; 6 and more are of the split `long`


def accuracy_by_steps(arms: dict[str, Any], colours: dict[str, str]) -> str:
    """Right answers by number of steps; beyond 5 no model has trained."""
    figure, axes = plt.subplots(figsize=(8.2, 4.4))
    for arm, entry in arms.items():
        quality = entry.get("long", {}).get("quality", {}) | entry["quality"]
        found = {n: quality[f"accuracy_{n}"] for n in STEPS if f"accuracy_{n}" in quality}
        means = [100 * metric["mean"] for metric in found.values()]
        bounds = [[100 * bound for bound in metric["ci95"]] for metric in found.values()]
        error = [
            [max(0, m - low) for m, (low, _) in zip(means, bounds, strict=True)],
            [max(0, high - m) for m, (_, high) in zip(means, bounds, strict=True)],
        ]
        axes.errorbar(
            list(found), means, yerr=error, marker="o", ms=3, capsize=2, lw=1.2,
            color=colours[arm], label=arm,
        )  # fmt: skip
    axes.axvspan(5.5, 8.3, color="#999", alpha=0.12, lw=0)
    axes.set(xlabel="steps of the problem (grey: more than in training)", ylabel="right answers %")
    axes.legend(**BESIDE)
    return picture(figure)


def thinking_longer(arms: dict[str, Any], colours: dict[str, str]) -> str:
    """Right answers against tokens and FLOPs per problem: thinking longer, and more votes; below on
    problems longer than any in training."""
    found = [{arm: entry["reasoning"] for arm, entry in arms.items()}]
    found += [{arm: told["long"] for arm, told in found[0].items() if "long" in told}]
    figure, grid = plt.subplots(2, 2, figsize=(11, 7.4), sharex="col", sharey="row")
    keys = ("tokens_per_problem", "flops_per_problem")
    for curves, row, what in zip(found, grid, ("1 to 5 steps", "6 to 8 steps"), strict=True):
        for axes, key in zip(row, keys, strict=True):
            for arm, told in curves.items():
                for curve, style in (("thinking", "o-"), ("voting", "s--")):
                    line(axes, told[curve] or [], key, style, colours[arm], arm)
            axes.set(xscale="log", ylim=(-3, 103))
        row[0].set_ylabel(f"right answers %, {what}")
    for axes, key in zip(grid[1], keys, strict=True):
        axes.set_xlabel(key.replace("_", " ").replace("flops", "FLOPs"))
    handles, labels = grid[0][1].get_legend_handles_labels()
    grid[0][1].legend(handles[1::2], labels[1::2], **BESIDE)  # each arm has two
    return picture(figure)


def line(
    axes: plt.Axes, points: list[dict[str, Any]], key: str, style: str, colour: str, arm: str
) -> None:
    """Of a curve of test-time scaling, with its intervals; empty where there are no points."""
    y, ends = [100 * p["accuracy"] for p in points], [p["ci95"] for p in points]
    error = [
        [max(0.0, here - 100 * low) for here, (low, _) in zip(y, ends, strict=True)],
        [max(0.0, 100 * high - here) for here, (_, high) in zip(y, ends, strict=True)],
    ]
    axes.errorbar(
        [p[key] for p in points], y, yerr=error if points else None, fmt=style, ms=3, lw=1.2,
        elinewidth=0.5, color=colour, label=arm,
    )  # fmt: skip


def first_wrong_steps(arms: dict[str, Any], colours: dict[str, str]) -> str:
    """Of the problems of 5 steps: at which step a trace first goes wrong, in %."""
    figure, axes = plt.subplots(figsize=(8.2, 4.4))
    shown = {
        arm: entry["reasoning"]["first_wrong_step"]["5"]
        for arm, entry in arms.items()
        if entry["reasoning"]["first_wrong_step"]
    }
    width = 0.8 / max(1, len(shown))
    for place, (arm, counts) in enumerate(shown.items()):
        at = np.arange(1, len(counts)) + (place - len(shown) / 2 + 0.5) * width
        axes.bar(at, 100 * np.array(counts[1:]) / sum(counts), width, color=colours[arm], label=arm)
    axes.set_xticks(range(1, 7), labels=[*"12345", "one too many"])
    axes.set(xlabel="first wrong step", ylabel="% of the problems of 5 steps")
    axes.legend(**BESIDE)
    return picture(figure)


def where_traces_pay(result: dict[str, Any]) -> str:
    """A map: what traces gain over answers alone at equal FLOPs, in points of right answers, by
    pair of students and number of steps."""
    students, shares = result["students"], result["cost"]["fraction_of_teacher_by_student"]
    cells = {(cell["claim"], cell["steps"]): cell for cell in result["map"]}
    claims = list(dict.fromkeys(cell["claim"] for cell in result["map"]))
    gains = np.array([[100 * cells[claim, n]["difference"] for n in STEPS] for claim in claims])
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.45 * len(claims)))
    axes.imshow(gains, cmap="RdBu", vmin=-100, vmax=100, aspect="auto")
    for (row, column), gain in np.ndenumerate(gains):
        opinion = OPINION[cells[claims[row], STEPS[column]]["result"]].replace("beats", "")
        colour = "white" if abs(gain) > 60 else "black"
        text = f"{gain:+.0f} {opinion}".strip()
        axes.text(column, row, text, ha="center", va="center", fontsize=9, color=colour)
    labels = []
    for claim in claims:
        arm, _, other = claim.split()
        cost = 100 * shares[arm]["flops"]
        size = students[arm]["params"] / 1000
        rows = result["cost"]["outputs_by_student"][arm]["rows"]
        labels.append(f"{arm} over {other} ({size:.0f} k, {rows:,}, {cost:.1f} %)")
    axes.axvline(4.5, color="#555", lw=1)
    axes.set_yticks(range(len(claims)), labels=labels, fontsize=8)
    axes.set_xticks(range(len(STEPS)), labels=STEPS)
    axes.set_xlabel("steps of the problem (right of the line: more than in training)")
    return picture(figure)


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
    """Accuracy against confidence; of many arms the first ones alone."""
    figure, axes = plt.subplots(figsize=(6.4, 4.4))
    axes.plot([0, 1], [0, 1], color="#999", lw=1, ls="--")
    for arm, judged in list(first.items())[:MANY]:
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
    axes.legend(**BESIDE)
    return picture(figure)


def picture(figure: plt.Figure) -> str:
    """A figure as an SVG data address, the same bytes for the same figure."""
    buffer = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "lab", "svg.fonttype": "none"}):
        figure.tight_layout()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
