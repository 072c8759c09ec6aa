"""References: the committed result of a config, and the bands in which a rerun must lie.

The bands are two-sided normal tolerance intervals over the seeds of reference runs (Howe 1969,
JASA 64, 610-620): with 95 % confidence they contain all m metrics, and the differences that claims
are about, of 95 % of all seeds at once, so each has a coverage of 1 - 5 % / m (Bonferroni).
Reference runs decide whether a rerun is accepted, as in MLPerf's reference convergence points
(Mattson et al. 2020, arXiv 1910.01500, section 3.3). Every seed of a rerun must lie in the band,
not only their mean.
"""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from configs.files import Shape, differences, read_json, read_sealed, write_atomically, write_json
from configs.schema import MACHINE_KEYS, Config, LabError
from experiment.command import command_line
from experiment.reading import check_config
from experiment.run import Run
from measure.report.documents import rewrite_pages, with_minutes
from measure.report.page import render_picture
from measure.report.tables import per_seed_values
from measure.verdicts import ONE_RUN, claim_of

COVERAGE = CONFIDENCE = 0.95
MIN_SEEDS, MIN_TEACHERS = 10, 5
MIN_HALF_WIDTH = 0.001  # a metric at its limit (0 of 6,298 words) has no deviation
# Keys in which runs of one config may differ.
PER_REFERENCE = (*MACHINE_KEYS, "seeds", "teacher.seed")


class Values(Shape):
    """One metric of one model."""

    per_seed: list[float | None]


class Entry(Shape):
    """One model."""

    params: int | None  # None: of a teacher behind an endpoint
    quality: dict[str, Values]
    fidelity: dict[str, Values]


class Where(Shape):
    """An environment, and those in which the run was trained."""

    packages: dict[str, str]
    trained: "Where | None" = None
    earlier: list["Where"] | None = None


class Band(Shape):
    low: float
    high: float
    values: list[float]


class Decided(Shape):
    """A verdict."""

    claim: str
    metric: str
    split: str
    threshold: float
    result: str
    per_seed: list[float]


class Result(Shape):
    """What eval.json and the committed results are read for."""

    config: dict[str, Any]
    split: str
    seeds: list[int]
    teacher: Entry
    students: dict[str, Entry]
    controls: dict[str, Entry]
    environment: Where
    artifacts: dict[str, str]
    rows: dict[str, str] | None = None
    verdicts: list[Decided]
    bands: dict[str, Band] | None = None
    trace: dict[str, list[float]] | None = None


def read_result(path: Path) -> dict[str, Any]:
    """The evaluation of a run (its folder) or a committed result (a file). LabError if it is
    damaged or was changed."""
    if path.is_dir():
        if not (path / "eval.json").exists():
            command = command_line("eval.py", path)
            raise LabError(f"{path} is not evaluated yet; run {command} first")
        return read_sealed(path / "eval.json", Result)
    return read_json(path, Result)


def bands(results: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The band of every metric, and of every claim's difference, over the seeds of several results
    of one config. None for fewer than 10 seeds or 5 teachers: a rerun on another machine has
    another teacher, and of fewer a band would be too wide to reject anything."""
    students = [(r["config"]["teacher"]["seed"], seed) for r in results for seed in r["seeds"]]
    if len(set(students)) < len(students):
        raise LabError(
            "two of these runs hold the same student (teacher.seed and seed), which would make the "
            "bands too narrow; remove one"
        )
    pooled: dict[str, dict[Any, list[float]]] = {}
    for result in results:
        teacher = result["config"]["teacher"]
        for key, values in per_seed_values(result).items():
            of_teacher = pooled.setdefault(key, {}).setdefault(teacher["seed"], [])
            of_teacher += values
    if len(students) < MIN_SEEDS or len({seed for seed, _ in students}) < MIN_TEACHERS:
        return None
    unknown = [key for key, groups in pooled.items() if None in itertools.chain(*groups.values())]
    for key in unknown:  # a metric that a seed does not have
        del pooled[key]
    coverage = 1 - (1 - COVERAGE) / len(pooled)
    return {key: band(list(groups.values()), coverage) for key, groups in pooled.items()}


def band(groups: list[list[float]], coverage: float) -> dict[str, Any]:
    """The tolerance interval of a value that varies between teachers and between the students of
    each; groups: the values of each teacher's students.

    Howe 1969, equation 3.2, with an upper bound of the variance of a new value: that of the
    teachers' means and a part of that within teachers (modified large-sample bound, Graybill and
    Wang 1980). With one student per teacher it is the bound of one variance.
    """
    values = [value for group in groups for value in group]
    if not np.isfinite(values).all():
        raise LabError("a metric of these runs is not a number, so it has no band; evaluate again")
    means = np.array([np.mean(group) for group in groups])
    size = len(groups) / sum(1 / len(group) for group in groups)  # harmonic mean
    within_freedom = len(values) - len(groups)
    squares = sum(len(group) * float(np.var(group)) for group in groups)
    within = (1 - 1 / size) * squares / max(1, within_freedom)
    parts = [(float(means.var(ddof=1)), len(groups) - 1), (within, within_freedom)]
    variance = sum(part for part, _ in parts)
    beyond = [
        part * (freedom / stats.chi2.ppf(1 - CONFIDENCE, freedom) - 1)
        for part, freedom in parts
        if freedom
    ]
    of_mean = parts[0][0] / len(groups)
    bound = (variance + math.hypot(*beyond)) * (1 + of_mean / max(variance, 1e-300))
    reach = max(stats.norm.ppf((1 + coverage) / 2) * math.sqrt(bound), MIN_HALF_WIDTH)
    middle = float(means.mean())
    return {"values": values, "low": middle - reach, "high": middle + reach}


def committed_differences(config: Config, folder: Path) -> dict[str, dict[str, Any]]:
    """{claim: its differences in the committed runs of this config, their mean, spread and number,
    and in how many the first model was better}."""
    file = folder / f"{config.name}.json"
    if not file.exists():
        return {}
    reference = read_result(file)
    if not reference.get("bands") or other_configs(reference["config"], config, PER_REFERENCE):
        return {}
    return {key: in_committed_runs(found["values"]) for key, found in reference["bands"].items()}


def in_committed_runs(differences: list[float]) -> dict[str, Any]:
    return {
        "mean": float(np.mean(differences)),
        "spread": float(np.std(differences, ddof=1)),
        "runs": len(differences),
        "ahead": int(np.sum(np.array(differences) > 0)),
        "values": differences,
    }


def other_configs(stored: dict[str, Any], config: Config, ignored: tuple[str, ...]) -> list[str]:
    """Where a stored config differs from this one, except in the keys `ignored`; missing keys have
    their defaults."""
    there = check_config(stored, "the stored config").model_dump(mode="json")
    found = differences(there, config.model_dump(mode="json"))
    names = tuple(f"{key}{end}" for key in ignored for end in ":.")
    return [line for line in found if not line.startswith(names)]


def write_reference(run: Run, config: Config, others: list[Path], folder: Path) -> None:
    """Write <folder>/<name>.json, with bands over this run and others that differ in seeds (run
    folders, or their results), and its tables and its picture in the README and docs/ beside that
    folder."""
    results = [read_result(run.folder)]
    for other in others:
        results.append(read_result(other))
        differing = other_configs(results[-1]["config"], config, PER_REFERENCE)
        if differing:
            raise LabError(f"{other} is a run of another config: {differing[0]}")
    found = bands(results)
    reference = {**results[0], "bands": found}
    for verdict in reference["verdicts"] if found else []:
        if verdict["result"] == ONE_RUN:
            verdict["committed"] = in_committed_runs(found[claim_of(verdict)]["values"])
    where = results[0]["environment"]
    if where["dirty"] or where["trained"]["dirty"]:
        print("made with uncommitted code: others cannot check out the code of this result")
    if reference["bands"] is None:
        print(
            f"no bands written: they need {MIN_SEEDS} seeds and {MIN_TEACHERS} teachers; name more "
            "runs with --bands"
        )
    write_json(folder / f"{config.name}.json", reference)
    rewrite_pages(folder)
    file = folder.parent / "configs" / f"{config.name}.yaml"
    if file.exists():
        write_atomically(file, with_minutes(file.read_text(encoding="utf-8"), reference))
    picture = folder.parent / "docs" / f"{config.name}.svg"
    if picture.exists():
        write_atomically(picture, render_picture(reference))
