"""The figures of studies: of cost, access, temperature, size, and of reasoning."""

from typing import Any

import matplotlib as mpl
import numpy as np

from measure.laws import Law, students_differing_in
from measure.metrics import DIVERGENCE, metrics_in
from measure.report.drawing import (
    GREY,
    MARKERS,
    SERIES,
    WIDTH,
    Styles,
    add_legend,
    draw_intervals,
    drawn,
    plain_ticks,
    subplots,
)
from measure.report.figures import spread_labels
from measure.report.tables import (
    by_split,
    defence_name,
    fidelity_shown,
    heading,
    in_a_cell,
    models_in,
    task_of,
    value_in,
)
from tasks.task import Task

ACCESS_KEYS = ("access", "outputs.k")


def quality_against_cost(result: dict[str, Any], name: str) -> str:
    """A curve for each kind of student over its budgets, with intervals; the teacher, dashed."""
    metric, costs = metrics_in(result)[name], result["cost"]["fraction_of_teacher_by_student"]
    figure, axes = subplots()
    for number, (kind, students) in enumerate(result["savings"]["curves"].items()):
        values = [value_in(result["students"][student], name) for student in students]
        x = [100 * costs[student]["flops"] for student in students]
        style = {"color": SERIES[number % len(SERIES)], "marker": MARKERS[number % len(MARKERS)]}
        draw_intervals(axes, x, values, metric.scale, label=kind, **style)
    teacher = value_in(result["teacher"], name)
    if teacher and not metric.needs_teacher:
        axes.axhline(metric.scale * teacher["mean"], color=GREY, ls="--", lw=1, label="teacher")
    axes.set(xscale="log", xlabel="% of the teacher's training FLOPs", ylabel=heading(metric))
    plain_ticks(axes.xaxis)
    add_legend(figure, axes)
    return drawn(figure, f"{metric.heading} against cost, for each kind of student")


def quality_against_payment(result: dict[str, Any], name: str, cost: str) -> str:
    """A curve for each kind of access over what its outputs cost in tokens or money, with
    intervals; controls that bought nothing, dashed."""
    metric, bought = metrics_in(result)[name], result["bought"]
    figure, axes = subplots()
    for number, (kind, students) in enumerate(bought["curves"].items()):
        values = [value_in(result["students"][student], name) for student in students]
        x = [bought["paid"][student][cost] for student in students]
        style = {"color": SERIES[number % len(SERIES)], "marker": MARKERS[number % len(MARKERS)]}
        draw_intervals(axes, x, values, metric.scale, label=kind, **style)
    for control, line in (("baseline", "--"), ("low_data", ":")):
        value = value_in(result["controls"].get(control, {}), name)
        if value:
            axes.axhline(metric.scale * value["mean"], color=GREY, ls=line, lw=1, label=control)
    label = {"tokens": "tokens bought", "money": result["config"]["cost"]["currency"]}[cost]
    axes.set(xscale="log", xlabel=label, ylabel=heading(metric))
    add_legend(figure, axes)
    return drawn(figure, f"{metric.heading} against {label}, for each kind of access")


def damage_against_price(result: dict[str, Any]) -> str:
    """Each defence: how much further the best student of an extractor is from the teacher, against
    how much further the teacher's own answers are; a mark for each kind of exposure."""
    found = result["defence"]
    prices = {defence_name(one): one[DIVERGENCE] for one in found["settings"]}
    figure, axes = subplots()
    most = max(one["prompts"] for one in found["cells"])
    kinds = list(dict.fromkeys(one["exposure"] for one in found["cells"]))
    points = []
    for number, kind in enumerate(kinds):
        cells = [
            one for one in found["cells"]
            if one["exposure"] == kind and one["prompts"] == most and one["damage"] is not None
        ]  # fmt: skip
        x = [prices[defence_name(one)] for one in cells]
        y = [one["damage"] for one in cells]
        style = {"color": SERIES[number % len(SERIES)], "marker": MARKERS[number % len(MARKERS)]}
        axes.plot(x, y, ls="", label=kind, **style)
        points += [(at, up, defence_name(one)) for at, up, one in zip(x, y, cells, strict=True)]
    for at, up, name in points:
        axes.annotate(name, (at, up), xytext=(5, 4), textcoords="offset points", fontsize=7)
    axes.axhline(0, color=GREY, lw=1)
    axes.set(
        xlabel="price: KL of answers from the undefended teacher, nats",
        ylabel="damage to the student, nats",
    )
    axes.margins(x=0.15, y=0.15)
    add_legend(figure, axes)
    return drawn(figure, "damage to an extractor's student against the price for customers")


def divergence_against_prompts(result: dict[str, Any]) -> str:
    """KL to the teacher against the number of prompts, for each exposure (marker) and defence
    (colour); controls that bought nothing, dashed."""
    found = result["defence"]
    curves: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for one in found["cells"]:
        curves.setdefault((one["exposure"], defence_name(one)), []).append(
            (one["prompts"], one["divergence"])
        )
    names = list(dict.fromkeys(name for _, name in curves))
    kinds = list(dict.fromkeys(kind for kind, _ in curves))
    figure, axes = subplots(size=(1.4 * WIDTH, 3.6))
    for (kind, name), points in curves.items():
        x, y = zip(*sorted(points), strict=True)
        style = {
            "color": SERIES[names.index(name) % len(SERIES)],
            "marker": MARKERS[kinds.index(kind) % len(MARKERS)],
        }
        axes.plot(x, y, label=f"{kind}, {name}", lw=1.2, **style)
    for control, line in (("baseline", "--"), ("low_data", ":")):
        value = value_in(result["controls"].get(control, {}), DIVERGENCE)
        if value:
            axes.axhline(value["mean"], color=GREY, ls=line, lw=1, label=control)
    axes.set(xscale="log", yscale="log", xlabel="prompts", ylabel="KL to teacher, nats")
    add_legend(figure, axes)
    return drawn(figure, "KL to the teacher against prompts, for each exposure and defence")


def spectrum(result: dict[str, Any]) -> str:
    """Singular values of the logits that can be known from what is shown; the line is at the hidden
    size of the teacher."""
    found = result["defence"]["stealing"]
    figure, axes = subplots()
    for number, (how, one) in enumerate(found["shown"].items()):
        values = np.maximum(one["singular_values"], 1e-9)
        style = {"color": SERIES[number % len(SERIES)], "marker": MARKERS[number % len(MARKERS)]}
        axes.plot(np.arange(len(values)) + 1, values, lw=1.2, markevery=0.1, label=how, **style)
    axes.axvline(found["size"], color=GREY, ls="--", lw=1)
    axes.set(yscale="log", xlabel="dimension", ylabel="singular value")
    add_legend(figure, axes)
    return drawn(figure, "singular values of the logits, by what is shown of them")


def bytes_against_kl(result: dict[str, Any], styles: Styles) -> str:
    """KL to the teacher against bytes per token of the outputs, for recipes that differ only in
    access."""
    figure, axes = subplots()
    weights = {a: s["bytes_per_token"] for a, s in result["cost"]["outputs_by_student"].items()}
    points = []
    for name in students_differing_in(result, ACCESS_KEYS):
        value = result["students"][name]["fidelity"][DIVERGENCE]
        draw_intervals(axes, [weights[name]], [value], 1.0, **styles[name])
        points.append((value["mean"], weights[name], name))
    spread_labels(axes, points)
    axes.set(xscale="log", xlabel="bytes per token of the outputs", ylabel="KL to teacher, nats")
    return drawn(figure, "KL to the teacher against the size of its outputs")


def scaling(result: dict[str, Any], study: dict[str, Any], label: str, styles: Styles) -> str:
    """KL to the teacher against x, with the fitted law."""
    figure, axes = subplots()
    points = []
    for name, x in study["x"].items():
        value = result["students"][name]["fidelity"][DIVERGENCE]
        draw_intervals(axes, [x], [value], 1.0, **styles[name])
        points.append((x, value["mean"], name))
    for x, y, name in points:
        axes.annotate(name, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=7)
    if study["law"]:
        law, along = Law(*study["law"]), np.geomspace(min(points)[0], max(points)[0], 100)
        axes.plot(along, law(along), color=GREY, lw=1, ls="--", zorder=0)
        axes.set_title(f"KL = {law}")
    axes.set(xscale="log", yscale="log", xlabel=label, ylabel="KL to teacher, nats")
    axes.margins(x=0.12)
    return drawn(figure, f"KL to the teacher against {label}")


def fidelity_by_temperature(result: dict[str, Any]) -> str:
    """Fidelity against temperature, for recipes that differ only in temperature."""
    figure, axes = subplots()
    students, names = result["students"], students_differing_in(result, ("temperature",))
    found = sorted((students[name]["recipe"]["temperature"], name) for name in names)
    metric, temperatures = metrics_in(result)[fidelity_shown(result)], [value for value, _ in found]
    values = [value_in(students[name], fidelity_shown(result)) for _, name in found]
    draw_intervals(axes, temperatures, values, metric.scale, color=SERIES[0], marker="o")
    axes.set(xscale="log", xlabel="temperature", ylabel=heading(metric))
    axes.set_xticks(temperatures, labels=[f"{value:g}" for value in temperatures])
    axes.minorticks_off()
    return drawn(figure, f"{metric.heading} against temperature")


# -- reasoning -------------------------------------------------------------------------------------


def accuracy_by_steps(result: dict[str, Any], styles: Styles) -> str:
    """Right answers by number of steps; the later splits have more steps than in training."""
    task = task_of(result)
    figure, axes = subplots(size=(1.4 * WIDTH, 3.6))
    for name, entry in models_in(result).items():
        quality: dict[str, Any] = {}
        for values in by_split(entry, result).values():
            quality = values.get("quality", {}) | quality
        numbers = [n for n in all_steps(task) if task.accuracy_at(n) in quality]
        accuracies = [quality[task.accuracy_at(n)] for n in numbers]
        draw_intervals(axes, numbers, accuracies, 100, label=name, **styles[name])
    trained = max(task.steps[task.evaluation_splits[0]])
    axes.axvspan(trained + 0.5, max(all_steps(task)) + 0.3, color=GREY, alpha=0.15, lw=0)
    axes.set(xlabel="steps of the problem (grey: more than in training)", ylabel="right answers %")
    add_legend(figure, axes)
    return drawn(figure, "right answers by number of steps")


def all_steps(task: type[Task]) -> list[int]:
    return sorted({n for steps in task.steps.values() for n in steps})


def thinking_longer(result: dict[str, Any], styles: Styles) -> str:
    """Right answers against tokens and FLOPs per problem, for longer reasoning and more votes; a
    row of plots per split."""
    task = task_of(result)
    models = {n: e["reasoning"] for n, e in models_in(result).items() if "reasoning" in e}
    first, *others = (split for split in task.evaluation_splits if task.steps.get(split))
    rows = {first: models}
    for split in others:
        rows[split] = {name: curves[split] for name, curves in models.items() if split in curves}
    figure, grid = subplots(
        len(rows), 2, size=(2 * WIDTH, 3 * len(rows)), sharex="col", sharey="row", squeeze=False
    )
    keys = ("tokens_per_problem", "flops_per_problem")
    for (split, curves), row in zip(rows.items(), grid, strict=True):
        for axes, key in zip(row, keys, strict=True):
            for name, by_kind in curves.items():
                for kind, dashes in (("thinking", "-"), ("voting", "--")):
                    points = by_kind[kind] or []
                    values = [{"mean": p["accuracy"], "ci95": p["ci95"]} for p in points]
                    x = [p[key] for p in points]
                    style = styles[name] | {"ls": dashes}
                    draw_intervals(axes, x, values, 100, label=name, **style)
            axes.set(xscale="log", ylim=(-3, 103))
        steps = task.steps[split]
        row[0].set_ylabel(f"right answers %, {min(steps)} to {max(steps)} steps")
    for axes, key in zip(grid[-1], keys, strict=True):
        axes.set_xlabel(key.replace("_", " ").replace("flops", "FLOPs"))
    add_legend(figure, grid[0][1], each=2)
    return drawn(figure, "right answers against tokens and FLOPs per problem")


def first_wrong_steps(result: dict[str, Any], styles: Styles) -> str:
    """At which step a trace first goes wrong, in % of the longest problems seen in training."""
    task = task_of(result)
    longest = max(task.steps[task.evaluation_splits[0]])
    figure, axes = subplots(size=(1.4 * WIDTH, 3.2))
    histograms = {
        name: entry["reasoning"]["first_wrong_step"][str(longest)]
        for name, entry in models_in(result).items()
        if entry.get("reasoning", {}).get("first_wrong_step")
    }
    width = 0.8 / max(1, len(histograms))
    for place, (name, counts) in enumerate(histograms.items()):
        at = np.arange(1, len(counts)) + (place - len(histograms) / 2 + 0.5) * width
        shares = 100 * np.array(counts[1:]) / sum(counts)
        axes.bar(at, shares, width, color=styles[name]["color"], label=name)
    axes.set_xticks(
        range(1, longest + 2), labels=[*map(str, range(1, longest + 1)), "one too many"]
    )
    axes.set(xlabel="first wrong step", ylabel=f"% of the problems of {longest} steps")
    add_legend(figure, axes)
    return drawn(figure, "the first wrong step of each model's traces")


def where_traces_pay(result: dict[str, Any]) -> str:
    """A map: what traces gain over only their answers at equal FLOPs, in points of right answers,
    by pair of students and number of steps."""
    task = task_of(result)
    students, shares = result["students"], result["cost"]["fraction_of_teacher_by_student"]
    cells = {(cell["claim"], cell["steps"]): cell for cell in result["map"]}
    claims = list(dict.fromkeys(cell["claim"] for cell in result["map"]))
    steps = [n for n in all_steps(task) if (claims[0], n) in cells]
    gains = np.array([[100 * cells[claim, n]["difference"] for n in steps] for claim in claims])
    figure, axes = subplots(size=(2 * WIDTH, 0.9 + 0.36 * len(claims)))
    colours = mpl.colormaps["RdBu"]
    axes.pcolormesh(gains, cmap=colours, vmin=-100, vmax=100)
    for (row, column), gain in np.ndenumerate(gains):
        unsure = "?" if in_a_cell(cells[claims[row], steps[column]]) == "?" else ""
        place = (column + 0.5, row + 0.5)
        text = f"{gain:+.0f} {unsure}".strip()
        colour = readable_on(colours((gain + 100) / 200))
        axes.text(*place, text, ha="center", va="center", color=colour)
    labels = []
    for claim in claims:
        name, _, other = claim.split()
        cost = 100 * shares[name]["flops"]
        size = students[name]["params"] / 1000
        rows = result["cost"]["outputs_by_student"][name]["rows"]
        labels.append(f"{name} over {other} ({size:.0f} k, {rows:,}, {cost:.1f} %)")
    trained = max(task.steps[task.evaluation_splits[0]])
    axes.axvline(steps.index(trained) + 1, color="black", lw=1.5)
    axes.invert_yaxis()
    axes.set_yticks(np.arange(len(claims)) + 0.5, labels=labels, fontsize=8)
    axes.set_xticks(np.arange(len(steps)) + 0.5, labels=steps)
    axes.set_xlabel("steps of the problem (right of the line: more than in training)")
    return drawn(figure, "where training on traces pays, by number of steps")


def readable_on(colour: tuple[float, ...]) -> str:
    """Black or white, whichever stands out against it."""
    red, green, blue, _ = colour
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "black"
