"""What the labs read and draw beside their own files."""

import json
from typing import TYPE_CHECKING, Any

from labs.source import FOLDER, MINE

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def committed_result(name: str) -> dict[str, Any]:
    """results/NAME.json: what a config of this project gave."""
    file = FOLDER.parent / "results" / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8"))


def new_picture() -> "Axes":
    import matplotlib.pyplot as plt  # its first import takes seconds, and checks draw nothing

    return plt.subplots(figsize=(5, 3), layout="constrained")[1]


def save_picture(axes: "Axes", name: str) -> None:
    """Into mine/; a notebook shows it, too."""
    file = MINE / f"{name}.png"
    file.parent.mkdir(exist_ok=True)
    axes.legend()
    axes.figure.savefig(file, dpi=150)
    print(f"picture {file}")
