"""A blind trial: which of these students were taught by whom? The labels stay sealed until then.

    python -m experiment.blind make runs/a runs/b --out blind
    python -m experiment.blind examine blind --candidates runs/a runs/b --innocent runs/c
    python -m experiment.blind score blind

`make` copies the students of some runs, without their names, into numbered folders. `examine`
compares them with candidates, as `eval.py --provenance` does, and writes a verdict for each; a
person can write verdicts of their own instead. `score` opens the labels.
"""

import argparse
import hashlib
import json
import secrets
import shutil
import sys
from pathlib import Path

import numpy as np

from configs.command import run_command
from configs.files import Shape, read_json, say, write_json
from configs.schema import LabError
from experiment.evidence import (
    COMPARED_TOKENS,
    SPLIT,
    candidates_of,
    innocent_of,
    measure_of,
)
from experiment.plan import Plan
from experiment.run import Run
from measure.provenance import FEWEST, accusations
from models.language import load_model
from tasks import load_task

LABELS, VERDICTS, TASK = "labels.json", "verdicts.json", "task.json"
NOBODY = "none"
REVEALING = {"README.md"}  # a model card tells where a model comes from


class Labels(Shape):
    """{number: {"teacher": the run that taught it or `none`, "recipe", "seed"}}, and a salt, so
    that the published hash does not give them away."""

    salt: str
    students: dict[str, dict[str, str | int]]


def make(options: argparse.Namespace) -> int:
    """Copy the students of runs into numbered folders, in random order."""
    if options.out.exists():
        raise LabError(f"{options.out} exists; name another --out")
    runs = [Run.finished(folder) for folder in options.runs]
    found = []
    for run in runs:
        plan = Plan(run.config())
        for name in plan.recipes:
            taught = plan.is_taught(name)
            for seed in plan.seeds_of(name):
                label = {"teacher": run.config().name if taught else NOBODY, "recipe": name}
                found.append((run.folder / plan.stage(name, seed), label | {"seed": seed}))
    order = np.random.Generator(np.random.PCG64(secrets.randbits(63))).permutation(len(found))
    labels = Labels(salt=secrets.token_hex(16), students={})
    for number, place in enumerate(order, start=1):
        folder, label = found[place]
        shutil.copytree(
            folder, options.out / f"{number:02}", ignore=shutil.ignore_patterns(*REVEALING)
        )
        labels.students[f"{number:02}"] = label
    write_json(options.out / TASK, runs[0].config().task.model_dump(mode="json"))
    write_json(options.out / LABELS, labels.model_dump())
    say(f"{len(found)} students in {options.out}; do not open {LABELS}, whose sha256 is")
    say(digest(labels))
    return 0


def digest(labels: Labels) -> str:
    return hashlib.sha256(json.dumps(labels.model_dump(), sort_keys=True).encode()).hexdigest()


def examine(options: argparse.Namespace) -> int:
    """Accuse a candidate of each student, or nobody."""
    runs = [Run.finished(folder) for folder in options.candidates]
    task = load_task(runs[0].config().task)
    if read_json(options.folder / TASK) != runs[0].config().task.model_dump(mode="json"):
        raise LabError(f"{options.folder} holds students of another task than {runs[0].folder}")
    candidates, rows = candidates_of(runs, task), task.rows(SPLIT)
    measured = measure_of("weights", candidates, task, rows, COMPARED_TOKENS)
    innocent, _ = innocent_of([Run.finished(folder) for folder in options.innocent], measured)
    if len(innocent) < FEWEST:
        raise LabError(f"{len(innocent)} innocent students, {FEWEST} are needed; name more runs")
    verdicts = {}
    for folder in sorted(p for p in options.folder.iterdir() if p.is_dir()):
        accused = [one for one in accusations(measured(load_model(folder)), innocent) if one.holds]
        best = max(accused, key=lambda one: one.t, default=None)
        verdicts[folder.name] = best.candidate if best else NOBODY
        what = f"{best.candidate}, t = {best.t:.1f}, p = {best.p:.2g}" if best else NOBODY
        say(f"{folder.name}  {what}")
    write_json(options.folder / VERDICTS, verdicts)
    say(f"next: python -m experiment.blind score {options.folder}")
    return 0


def score(options: argparse.Namespace) -> int:
    """How many verdicts are right, by kind of student."""
    labels = Labels(**read_json(options.folder / LABELS, Labels, "expected what `make` wrote"))
    verdicts = read_json(options.folder / VERDICTS, dict[str, str], "expected a name per number")
    missing = labels.students.keys() - verdicts.keys()
    if missing:
        raise LabError(f"no verdict on {', '.join(sorted(missing))}; write `{NOBODY}` for nobody")
    counts: dict[str, list[int]] = {}
    for number, label in labels.students.items():
        kind = f"{label['recipe']} of {label['teacher']}"
        right = verdicts[number] == label["teacher"]
        wrong = verdicts[number] not in (label["teacher"], NOBODY)
        counts.setdefault(kind, []).append(right - wrong)
    say(f"{'student':<34}{'right':>8}{'nobody':>8}{'wrong':>8}")
    for kind, found in sorted(counts.items()):
        tallies = [found.count(value) for value in (1, 0, -1)]
        say(f"{kind:<34}" + "".join(f"{tally:>8}" for tally in tallies))
    say(f"labels sha256 {digest(labels)}")
    return 0


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        "python -m experiment.blind", description=__doc__.splitlines()[0]
    )
    commands = found.add_subparsers(required=True)
    one = commands.add_parser("make", help="a set of students without names")
    one.add_argument("runs", nargs="+", type=Path)
    one.add_argument("--out", type=Path, required=True)
    one.set_defaults(do=make)
    one = commands.add_parser("examine", help="a verdict on each student, by closeness")
    one.add_argument("folder", type=Path)
    one.add_argument("--candidates", nargs="+", type=Path, required=True, metavar="RUN")
    one.add_argument("--innocent", nargs="+", type=Path, required=True, metavar="RUN")
    one.set_defaults(do=examine)
    one = commands.add_parser("score", help="open the labels")
    one.add_argument("folder", type=Path)
    one.set_defaults(do=score)
    return found


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    return run_command(lambda: options.do(options), "nothing was changed")


if __name__ == "__main__":
    sys.exit(main())
