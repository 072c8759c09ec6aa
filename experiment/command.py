"""What train.py and eval.py share as commands: their options, and how they are printed.

Imported before torch, whose import takes seconds.
"""

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from configs.command import sleep_soon

ROOT = Path(__file__).parent.parent


def train_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "train.py", description="Train a teacher, produce its outputs, train students and controls."
    )
    parser.add_argument("config", help="a YAML file, such as those in configs/")
    parser.add_argument("overrides", nargs="*", help="key=value, such as teacher.epochs=2")
    parser.add_argument("--runs", default="runs", type=Path, help="where run folders are kept")
    parser.add_argument(
        "--fresh", action="store_true", help="copy no teacher or outputs from other runs"
    )
    parser.add_argument(
        "--tune", action="store_true", help="try what the config's section tune names on the "
        "validation split, and write the best into the config",
    )  # fmt: skip
    return parser


def eval_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "eval.py", description="Evaluate a finished run: how closely do the students match the "
        "teacher, and at what cost?",
    )  # fmt: skip
    parser.add_argument("run", type=Path, nargs="?", help="a finished run, e.g. runs/quickstart")
    parser.add_argument(
        "--ask", nargs="*", metavar="QUESTION", help="print every model's answer; default: to "
        "held-out questions",
    )  # fmt: skip
    parser.add_argument("--split", default="heldout", choices=["heldout", "validation"])
    parser.add_argument(
        "--check", nargs="?", const="", metavar="NAME", help="compare with results/<name>.json"
    )
    parser.add_argument("--selfcheck", action="store_true", help="check for silent errors")
    parser.add_argument(
        "--radioactivity", action="store_true", help="do the students carry a watermark?"
    )
    parser.add_argument(
        "--key",
        type=Path,
        metavar="FILE",
        help="of the watermark or the canaries; default: that of the config",
    )
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="tested by --radioactivity instead of students"
    )
    parser.add_argument(
        "--leaks", action="store_true", help="which accounts' answers have the students learned?"
    )
    parser.add_argument(
        "--database", type=Path, metavar="FILE", help="of the server: accounts and usage log",
    )  # fmt: skip
    parser.add_argument(
        "--tokens", type=int, default=20_000, help="that each student writes for --radioactivity"
    )
    parser.add_argument(
        "--provenance", action="store_true", help="which of the --candidates taught the students?"
    )
    parser.add_argument(
        "--reach", choices=["weights", "scores", "text"], default="weights", help="what is known "
        "of the students for --provenance: distributions, scores of given texts, or only answers",
    )  # fmt: skip
    parser.add_argument(
        "--candidates", nargs="+", type=Path, default=[], metavar="RUN", help="whose teachers may "
        "have taught the students; the run's own teacher is one",
    )  # fmt: skip
    parser.add_argument(
        "--controls", type=int, default=8, help="innocent students that they are compared with"
    )
    parser.add_argument("--compare", nargs=2, type=Path, metavar="RUN", help="two runs")
    parser.add_argument(
        "--push", metavar="OWNER/NAME", help="upload a student with its model card to the hub"
    )
    parser.add_argument("--student", metavar="NAME", help="which one; default: the first recipe's")
    parser.add_argument("--environment", action="store_true", help="is this machine set up?")
    parser.add_argument("--update", action="store_true", help="also write results/<name>.json")
    parser.add_argument(
        "--bands", nargs="+", type=Path, metavar="RUN", default=[], help="with --update: evaluated "
        "runs of the same config from other seeds, for the band of every metric",
    )  # fmt: skip
    return parser


def before_imports(parser: argparse.ArgumentParser) -> None:
    """Answer --help and mistakes at once, stop on Ctrl-C without a traceback, and let threads that
    wait soon sleep."""
    sleep_soon()
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as a job in the background has it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    parser.parse_intermixed_args()


def command_line(script: str, *arguments: object) -> str:
    """A command for the reader's shell: it finds this Python and this script from where they are,
    whether or not they have activated an environment."""
    there = Path(sys.executable)
    found = shutil.which("python")
    if "UV" in os.environ:  # set by `uv run`, which finds the environment itself
        python = ["uv", "run", "python"]
    elif found and Path(found).parent == there.parent:
        python = ["python"]
    else:
        python = [from_here(there)]
    words = [*python, from_here(ROOT / script), *map(str, arguments)]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def from_here(path: Path) -> str:
    """Relative to the working directory if it lies in there, absolute otherwise."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
