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
from experiment.evidence import add_evidence, key_of, measure_of, models_of, written
from experiment.experiment import open_model, open_outputs
from experiment.leaks import answers_by_account
from experiment.plan import Plan
from experiment.run import Run
from measure.provenance import ALPHA, FEWEST, accusations
from measure.rates import Rate, between
from measure.report.documents import publish_study
from measure.watermark import Evidence, WithoutBias, stolen_bias
from models.language import Forward
from models.rows import Rows
from tasks import load_task
from tasks.task import Task
from teacher.api.store import Store
from teacher.watermark import SHARE

TOKENS = 28_000  # that each student writes
LENGTHS = (250, 500, 1_000, 2_000, 5_600)  # tokens of a text that is tested by itself
KEYS = 100  # random ones, for the spread without a mark
LIBRARY_KEYS = 4
SEED = 0  # of these keys
SEQUENCES = 100  # that teachers and students are compared on
REACHES = ("weights", "scores", "text")
NOBODY = "nobody"
SUBTRACTED = "marked, list subtracted"
NEEDED = {"plain", "marked", "fifth", "first", "innocent"}  # recipes that the claims name

# The claims, fixed before the study was run.
SPREAD = (0.9, 1.1)  # of z without a mark
FALSE = (0.03, 0.075)  # share of texts without a mark with p <= 0.05
POWER = {("marked", 1_000): 0.95, ("fifth", 5_600): 0.9}  # share of texts with p <= ALPHA
SOLD = ("plain", "marked", "fifth", "first")  # recipes that learn from sold answers


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

    def sha256(self, name: str, seed: int) -> str:
        """Of a student's weights."""
        return self.run.manifest["stages"][Plan(self.run.config()).stage(name, seed)]["sha256"]

    @cached_property
    def innocent(self) -> dict[str, Forward]:
        """{sha256: a student that learned from no teacher}."""
        return {
            self.sha256(name, seed): model
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
    z of texts of different innocent students with random keys, "library": those of the detector of
    transformers, "library_once": with each pair of tokens counted once}."""
    z: dict[str, list[float]] = {}
    power: dict[str, dict[int, Rate]] = {}
    unmarked: dict[str, Evidence] = {}
    library: dict[bool, list[float]] = {False: [], True: []}
    draw = np.random.Generator(np.random.PCG64(SEED))
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
            sha256 = trial.sha256(name, seed) if name == "innocent" else None
            if sha256 and sha256 not in unmarked:
                unmarked[sha256], tested = whole, keys(draw, LIBRARY_KEYS)
                for once, found_z in library.items():
                    found_z += library_z(text, trial, tested, once)
    null = [one.z(key) for key in keys(draw, KEYS) for one in unmarked.values()]
    both = {"library": library[False], "library_once": library[True]}
    return {"z": z, "power": power, "null": null, **both}


def keys(draw: np.random.Generator, count: int) -> list[int]:
    """The same whenever the study is made; an owner's are secret."""
    return [int(key) for key in 2 * draw.integers(0, 2**30, count) + 1]


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


def library_z(text: Rows, trial: Trial, tested: list[int], once: bool) -> list[float]:
    """z of the detector of transformers, which takes pairs of tokens for independent; once: each
    pair is counted once."""
    tokens = [token for i in range(len(text)) for token in text.completion(i).tolist()]
    found = []
    for key in tested:
        config = WatermarkingConfig(
            greenlist_ratio=SHARE, hashing_key=key, seeding_scheme="lefthash", context_width=1
        )
        detector = WatermarkDetector(trial.teacher.config, "cpu", config, once)
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
    """`wrong` if anybody but the right one is accused, too."""
    accused = {one.candidate for one in accusations(values, innocent) if one.holds}
    return NOBODY if not accused else "right" if accused == {right} else "wrong"


def without(values: dict[str, float], name: str) -> dict[str, float]:
    return {other: value for other, value in values.items() if other != name}


# -- an account ------------------------------------------------------------------------------------


def study_of_accounts(trials: list[Trial]) -> dict[str, dict[str, Counter]]:
    """{test: {recipe: which accounts are named: `right`, `wrong` (if only beside the right one) or
    `nobody`}}."""
    found: dict[str, dict[str, Counter]] = {}
    for trial in trials:
        with closing(Store(trial.run.folder / "api.sqlite")) as store:
            customers = {row["id"]: row["name"] for row in store.accounts()}
            key = key_of(trial.run, None)
            tests = answers_by_account(store, trial.teacher, trial.task, key)
        plan = Plan(trial.run.config())
        for name, _, model in trial.students:
            sources = {f"outputs/{customers[account]}": account for account in customers}
            right = {sources.get(stage) for stage in bought_by(plan, name)}
            for test, accounts in tests.items():
                ps = {account: sent.p(model, trial.task) for account, sent in accounts.items()}
                accused = {account for account, p in ps.items() if len(ps) * p <= ALPHA}
                named = NOBODY if not accused else "right" if accused <= right else "wrong"
                found.setdefault(test, {}).setdefault(name, Counter())[named] += 1
    return found


def bought_by(plan: Plan, name: str) -> set[str]:
    """The outputs of the teacher that a student has learned from, if only through another
    student."""
    recipe = plan.recipes[name]
    found = set()
    for teacher in recipe.teachers if plan.is_taught(name) else ():
        if teacher in plan.config.recipes:
            found |= bought_by(plan, teacher)
        elif request := plan.request(recipe):
            found.add(request.stage)
    return found


# -- the study -------------------------------------------------------------------------------------


def study(trials: list[Trial]) -> dict[str, Any]:
    marks = study_of_marks(trials)
    say("watermarks are done")
    teachers = study_of_teachers(trials)
    say("teachers are done")
    accounts = study_of_accounts(trials)
    null = np.array(marks["null"])
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
        "tokens": TOKENS,
        "null": spread_of(null) | {"false_5": share(null > 1.645)},
        "library": spread_of(np.array(marks["library"])),
        "library_once": spread_of(np.array(marks["library_once"])),
        "teachers": teachers,
        "accounts": accounts,
        "claims": claims_of(marks, teachers),
    }  # fmt: skip


def spread_of(z: np.ndarray) -> dict[str, Any]:
    """And how many texts would be accused."""
    false = share(norm.sf(z) <= ALPHA)
    return {"texts": len(z), "spread": spread(z), "false": false}


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
        rate = marks["power"][name][tokens]
        statement = f"the mark of `{name}` shows in at least {least:.0%} of texts of {tokens:,}"
        claims.append(between(f"{statement} tokens ({rate.total} texts)", rate.share, least, 1))
    kinds = teachers["weights"]
    innocent = kinds["innocent"]
    statement = f"none of {innocent.total()} innocent students is accused"
    claims.append(between(statement, innocent["wrong"], 0, 0))
    sold = sum((kinds[name] for name in SOLD), Counter())
    statement = f"all {sold.total()} students of sold answers are attributed to their teacher alone"
    claims.append(between(f"{statement}, by distributions", sold["wrong"] + sold["nobody"], 0, 0))
    unlisted = sum((kinds[f"{name}, unlisted"] for name in SOLD), Counter())
    statement = f"none of {unlisted.total()} is attributed to another if its teacher is not listed"
    claims.append(between(statement, unlisted["wrong"], 0, 0))
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
    publish_study(study(trials_of(options.runs)), options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
