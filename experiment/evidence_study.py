"""A study of evidence: how often it finds the students of a teacher, and whom else it accuses.

    python -m experiment.evidence_study runs/provenance runs/provenance-2 runs/provenance-3 \\
        --out results/provenance.json

The runs are of configs/provenance.yaml, each with a teacher and a watermark key of its own. What
is claimed was fixed before they were trained.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import norm
from transformers import WatermarkDetector, WatermarkingConfig

from configs.command import run_command
from configs.files import say
from configs.schema import LabError
from experiment.evidence import add_evidence, measure_of, models_of, written
from experiment.experiment import open_model, open_outputs
from experiment.leaks import answers_by_account
from experiment.plan import Plan
from experiment.reference import write_study
from experiment.run import Run
from measure.provenance import ALPHA, FEWEST, accusations
from measure.rates import Rate, at_least, between
from measure.watermark import Evidence, WithoutBias, other_keys, stolen_bias
from models.language import Forward
from models.rows import Rows
from tasks import load_task
from tasks.task import Task
from teacher.api.store import Store
from teacher.watermark import SHARE

TOKENS = 20_000  # that each student writes
LENGTHS = (250, 500, 1_000, 2_000, 5_600)  # tokens of a text that is tested by itself
KEYS = 100  # random ones, for the spread without a mark
LIBRARY_KEYS = 4
SEQUENCES = 100  # that teachers and students are compared on
REACHES = ("weights", "scores", "text")
NOBODY = "nobody"
SUBTRACTED = "marked, list subtracted"
NEEDED = {"plain", "marked", "fifth", "innocent"}  # recipes that the claims name

# The claims, fixed before the study was run.
SPREAD = (0.9, 1.1)  # of z without a mark
FALSE = (0.03, 0.075)  # share of texts without a mark with p <= 0.05
POWER = {("marked", 1_000): 0.95, ("fifth", 5_600): 0.9}  # share of texts with p <= ALPHA


@dataclass(frozen=True)
class Trial:
    """One of the runs, its teacher and its students."""

    run: Run
    task: Task

    @cached_property
    def name(self) -> str:
        return self.run.config().name

    @cached_property
    def teacher(self) -> Forward:
        return open_model(self.run, "teacher")

    @property
    def key(self) -> int:
        return self.run.config().teacher.api.watermark_key

    @cached_property
    def students(self) -> list[tuple[str, int, Forward]]:
        return [*models_of(self.run)]

    def taught(self, name: str) -> bool:
        return Plan(self.run.config()).is_taught(name)

    @cached_property
    def innocent(self) -> dict[str, Forward]:
        """{sha256 of the weights: a student that learned from no teacher}."""
        plan, stages = Plan(self.run.config()), self.run.manifest["stages"]
        return {
            stages[plan.stage(name, seed)]["sha256"]: model
            for name, seed, model in self.students
            if not self.taught(name)
        }


def trials_of(folders: list[Path]) -> list[Trial]:
    """LabError unless the runs have the same task, a watermark each, and different teachers."""
    runs = [Run.finished(folder) for folder in folders]
    task = load_task(runs[0].config().task)
    for run in runs:
        config, api = run.config(), run.config().teacher.api
        alike = config.task == runs[0].config().task and config.recipes.keys() >= NEEDED
        if not (alike and api and api.watermark_key):
            raise LabError(f"{run.folder} is no run of configs/provenance.yaml")
    teachers = {run.manifest["stages"]["teacher"]["sha256"] for run in runs}
    if len(teachers) < 3:
        raise LabError(
            f"{len(teachers)} different teachers in {len(runs)} runs, 3 are needed: train more "
            "with teacher.seed=... teacher.api.watermark_key=... name=..."
        )
    return [Trial(run, task) for run in runs]


# -- a watermark -----------------------------------------------------------------------------------


def study_of_marks(trials: list[Trial]) -> dict[str, Any]:
    """{"z": {recipe: z of each student's whole text}, "power": {recipe: {tokens: Rate}}, "null":
    z of texts without a mark with random keys, "library": those of the detector of transformers}.
    """
    z: dict[str, list[float]] = {}
    power: dict[str, dict[int, Rate]] = {}
    unmarked: dict[str, Evidence] = {}
    library: list[float] = []
    for trial in trials:
        for name, seed, model in [*trial.students, *without_the_list(trial)]:
            text = written(model, trial.task, trial.task.rows("heldout"), TOKENS, seed)
            whole = evidence_of(text, trial)
            z.setdefault(name, []).append(round(whole.z(trial.key), 2))
            for tokens in LENGTHS:
                found = [
                    norm.sf(evidence_of(part, trial).z(trial.key)) <= ALPHA
                    for part in parts_of(text, tokens)
                ]
                rate = power.setdefault(name, {}).get(tokens, Rate(0, 0))
                power[name][tokens] = rate + Rate(int(sum(found)), len(found))
            if name == "innocent":
                unmarked[f"{trial.name} {seed}"] = whole
                library += library_z(text, trial)
    null = [one.z(key) for key in other_keys(KEYS) for one in unmarked.values()]
    return {"z": z, "power": power, "null": null, "library": library}


def evidence_of(text: Rows, trial: Trial) -> Evidence:
    return add_evidence(Evidence(trial.task.vocabulary), text, trial.teacher, trial.task)


def parts_of(text: Rows, tokens: int) -> Iterator[Rows]:
    """Disjoint parts of at least this many tokens."""
    start, count = 0, 0
    for end, length in enumerate(text.lengths - text.prompt_lengths, start=1):
        count += int(length)
        if count >= tokens:
            yield text.take(np.arange(start, end))
            start, count = end, 0


def without_the_list(trial: Trial) -> Iterator[tuple[str, int, Forward]]:
    """Students of marked answers whose owner has found the list, and subtracts it when they write:
    pairs of tokens that marked answers have more often than an innocent student expects."""
    stage = Plan(trial.run.config()).request(trial.run.config().recipes["marked"]).stage
    answers = open_outputs(trial.run, stage).rows
    known = next(iter(trial.innocent.values()))
    surplus = add_evidence(Evidence(trial.task.vocabulary), answers, known, trial.task).surplus
    counted = counts_of(answers, trial.task)
    stolen = stolen_bias(counted, counted - surplus)
    for name, seed, model in trial.students:
        if name == "marked":
            yield SUBTRACTED, seed, WithoutBias(model, stolen)


def counts_of(text: Rows, task: Task) -> torch.Tensor:
    """[V, V] how often each token follows each other one in the completions."""
    found = Evidence(task.vocabulary)
    for i in range(len(text)):
        row, start = torch.tensor(text.row(i).tolist()), int(text.prompt_lengths[i])
        found.add(row[start - 1 : -1], row[start:])
    return found.surplus


def library_z(text: Rows, trial: Trial) -> list[float]:
    """z of the detector of transformers, which takes pairs of tokens for independent."""
    tokens = [token for i in range(len(text)) for token in text.completion(i).tolist()]
    found = []
    for key in other_keys(LIBRARY_KEYS):
        config = WatermarkingConfig(
            greenlist_ratio=SHARE, hashing_key=key, seeding_scheme="lefthash", context_width=1
        )
        detector = WatermarkDetector(trial.teacher.config, "cpu", config)
        found.append(float(detector(torch.tensor([tokens]), return_dict=True).z_score[0]))
    return found


# -- a teacher -------------------------------------------------------------------------------------


def study_of_teachers(trials: list[Trial]) -> dict[str, dict[str, Counter]]:
    """{reach: {kind of student: who is accused: `right`, `wrong` or `nobody`}}; kinds are recipes
    with all teachers as candidates, `... unlisted` without their own, and `innocent`."""
    task, found = trials[0].task, {}
    rows = task.rows("heldout").take(np.arange(SEQUENCES))
    candidates = {trial.name: trial.teacher for trial in trials}
    for reach in REACHES:
        measured = measure_of(reach, candidates, task, rows, SEQUENCES * task.longest_answer)
        models = {sha256: model for trial in trials for sha256, model in trial.innocent.items()}
        innocent = [measured(model) for model in models.values()]
        if len(innocent) <= FEWEST:
            raise LabError(f"{len(innocent)} different innocent students; train more seeds")
        kinds = found.setdefault(reach, {})
        for number, values in enumerate(innocent):
            others = [*innocent[:number], *innocent[number + 1 :]]
            kinds.setdefault("innocent", Counter())[verdict(values, others, "")] += 1
        for trial in trials:
            unlisted = [without(values, trial.name) for values in innocent]
            for name, _, model in trial.students:
                if trial.taught(name):
                    values = measured(model)
                    kinds.setdefault(name, Counter())[verdict(values, innocent, trial.name)] += 1
                    found_other = verdict(without(values, trial.name), unlisted, "")
                    kinds.setdefault(f"{name}, unlisted", Counter())[found_other] += 1
    return found


def verdict(values: dict[str, float], innocent: list[dict[str, float]], right: str) -> str:
    accused = [one for one in accusations(values, innocent) if one.holds]
    best = max(accused, key=lambda one: one.t, default=None)
    return NOBODY if best is None else "right" if best.candidate == right else "wrong"


def without(values: dict[str, float], name: str) -> dict[str, float]:
    return {other: value for other, value in values.items() if other != name}


# -- an account ------------------------------------------------------------------------------------


def study_of_accounts(trials: list[Trial]) -> dict[str, dict[str, Counter]]:
    """{test: {recipe: which account is named: `right`, `wrong` or `nobody`}}."""
    found: dict[str, dict[str, Counter]] = {}
    for trial in trials:
        with closing(Store(trial.run.folder / "api.sqlite")) as store:
            customers = {row["id"]: row["name"] for row in store.accounts()}
            tests = answers_by_account(store, trial.teacher, trial.task, trial.key)
        plan = Plan(trial.run.config())
        for name, _, model in trial.students:
            request = plan.request(plan.recipes[name])
            bought = request and request.stage.removeprefix("outputs/")
            for test, accounts in tests.items():
                ps = {account: sent.p(model, trial.task) for account, sent in accounts.items()}
                best = min(ps, key=ps.get)
                named = NOBODY
                if len(ps) * ps[best] <= ALPHA:
                    named = "right" if customers[best] == bought else "wrong"
                found.setdefault(test, {}).setdefault(name, Counter())[named] += 1
    return found


# -- the study -------------------------------------------------------------------------------------


def study(trials: list[Trial]) -> dict[str, Any]:
    marks = study_of_marks(trials)
    say("watermarks are done")
    teachers = study_of_teachers(trials)
    say("teachers are done")
    accounts = study_of_accounts(trials)
    null, library = np.array(marks["null"]), np.array(marks["library"])
    return {
        "schema": 1,
        "runs": [trial.name for trial in trials],
        "commits": [trial.run.manifest["environment"]["commit"] for trial in trials],
        "marks": {
            name: {
                "z": marks["z"][name],
                "power": {str(tokens): rate.summary() for tokens, rate in by_length.items()},
            }
            for name, by_length in marks["power"].items()
        },
        "null": {"texts": len(null), "spread": spread(null), "false_5": share(null > 1.645)},
        "library": {
            "texts": len(library), "spread": spread(library), "false_z_4": share(library > 4)
        },
        "teachers": teachers,
        "accounts": accounts,
        "claims": claims_of(marks, teachers),
    }  # fmt: skip


def spread(z: np.ndarray) -> float:
    return round(float(z.std(ddof=1)), 3)


def share(found: np.ndarray) -> float:
    return round(float(found.mean()), 4)


def claims_of(marks: dict[str, Any], teachers: dict[str, dict[str, Counter]]) -> list[dict]:
    null = np.array(marks["null"])
    claims = [
        between(
            f"without a mark, z has a standard deviation from {SPREAD[0]} to {SPREAD[1]}",
            spread(null),
            *SPREAD,
        ),
        between(
            f"without a mark, p <= 0.05 in {FALSE[0]:.1%} to {FALSE[1]:.1%} of the texts",
            share(null > 1.645),
            *FALSE,
        ),
    ]
    for (name, tokens), least in POWER.items():
        statement = f"the mark of `{name}` shows in at least {least:.0%} of texts of {tokens:,}"
        claims.append(at_least(f"{statement} tokens", marks["power"][name][tokens], least))
    kinds = teachers["weights"]
    innocent = Rate(kinds["innocent"]["wrong"], kinds["innocent"].total())
    claims.append(between("no innocent student is accused", innocent.found, 0, 0))
    listed = [kinds[name] for name in ("plain", "marked", "fifth")]
    right = Rate(sum(one["right"] for one in listed), sum(one.total() for one in listed))
    statement = "every student of sold answers is attributed to its teacher, by weights"
    claims.append(between(statement, right.total - right.found, 0, 0))
    unlisted = [one for name, one in kinds.items() if name.endswith(", unlisted")]
    wrong = sum(one["wrong"] for one in unlisted)
    claims.append(between("no student of an unlisted teacher is attributed", wrong, 0, 0))
    return claims


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        "python -m experiment.evidence_study", description=__doc__.splitlines()[0]
    )
    found.add_argument("runs", type=Path, nargs="+", help="three or more, of other teachers")
    found.add_argument("--out", type=Path, help="a JSON file; pages that show it are rewritten")
    return found


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    return run_command(lambda: run(options), "nothing was written")


def run(options: argparse.Namespace) -> int:
    found = study(trials_of(options.runs))
    for one in found["claims"]:
        say(f"{one['result']}: {one['claim']}")
    if options.out:
        write_study(options.out, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
