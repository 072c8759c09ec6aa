"""How the figures of the report are drawn: as SVG inside the page.

Colours stand for CSS variables, so that a figure follows the page into dark mode. Models differ in
colour and in marker, so that they can be told apart without colours.
"""

import html
import io
import re
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator

# Matplotlib takes no CSS variables: these hexadecimal numbers stand for them.
INK, GREY = "#010101", "#020202"
SERIES = [f"#0300{number:02x}" for number in range(6)]
VARIABLES = {INK: "currentColor", GREY: "var(--grey)"} | {
    colour: f"var(--series-{number})" for number, colour in enumerate(SERIES)
}
MARKERS, DASHES = "os^DvPX<", ("-", "--", ":", "-.")

STYLE = {
    "svg.fonttype": "none",
    "font.size": 9,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.labelcolor": INK,
    "axes.titlesize": 9,
    "axes.titlecolor": INK,
    "axes.edgecolor": GREY,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.3,
    "lines.markersize": 4,
}
mpl.rcParams.update(STYLE)
WIDTH = 4.6  # inches: the text is readable on a telephone
POINTS_PER_EM = 10.6  # of the page: text of 9 points is a little smaller than the text around it

Styles = dict[str, dict[str, Any]]  # {model: how it is drawn}


def styles_of(names: list[str]) -> Styles:
    """The teacher in the colour of the text; a colour and a marker for every other model."""
    others = [name for name in names if name != "teacher"]
    return {"teacher": {"color": INK, "marker": "*"}} | {
        name: {
            "color": SERIES[i % len(SERIES)],
            "marker": MARKERS[i % len(MARKERS)],
            "ls": DASHES[i // len(SERIES) % len(DASHES)],
        }
        for i, name in enumerate(others)
    }


def subplots(*grid: int, size: tuple[float, float] = (WIDTH, 3.0), **options: Any) -> Any:
    """A figure and its axes. size: width and height in inches."""
    return plt.subplots(*grid, figsize=size, layout="constrained", **options)


def add_legend(figure: plt.Figure, axes: plt.Axes, each: int = 1) -> None:
    """Below the figure, which grows by it. each: how many lines of the plot a model has."""
    handles, labels = (found[::each] for found in axes.get_legend_handles_labels())
    width, height = figure.get_size_inches()
    columns = max(1, int(width / 1.4))
    figure.set_size_inches(width, height + 0.17 * -(-len(labels) // columns))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def plain_ticks(*axes: mpl.axis.Axis) -> None:
    """Numbers of a logarithmic axis as 0.2, 0.5, 1, not as powers of ten."""
    for axis in axes:
        axis.set_minor_locator(LogLocator(subs=(2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}")


def draw_intervals(
    axes: plt.Axes, x: list[float], values: list[dict[str, Any]], scale: float, **style: Any
) -> None:
    """{"mean", "ci95"} of each value times `scale`, with its interval."""
    means = np.array([scale * value["mean"] for value in values])
    ends = scale * np.array([value["ci95"] for value in values]).reshape(-1, 2)
    errors = np.maximum(0, np.stack([means - ends[:, 0], ends[:, 1] - means]))
    axes.errorbar(x, means, yerr=errors, capsize=2, elinewidth=0.8, **style)


def drawn(figure: plt.Figure, label: str) -> str:
    """A figure as an SVG element; the same figure gives the same text. label: what it shows, for
    readers who do not see it."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": label}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    svg = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # would repeat from figure to figure
    svg = re.sub(r"#[0-9a-f]{6}\b", lambda match: VARIABLES.get(match[0], match[0]), svg)
    width, height = map(float, re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups())
    opening = (
        f'<svg role="img" aria-label="{html.escape(label)}" viewBox="0 0 {width:g} {height:g}" '
        f'style="width: {width / POINTS_PER_EM:.1f}em">'
    )
    return opening + svg[svg.index(">", svg.index("<svg")) + 1 :]
