"""References: the committed result of a config, and the bands in which a rerun must lie.

The bands are two-sided normal tolerance intervals over the seeds of reference runs (Howe 1969,
JASA 64, 610-620): with 95 % confidence they contain all m metrics of 95 % of all seeds at once, so
each has a coverage of 1 - 5 % / m (Bonferroni). Reference runs decide whether a rerun is accepted,
as in MLPerf's reference convergence points (Mattson et al. 2020, arXiv 1910.01500, section
3.3). Every seed of a rerun must lie in the band, not only their mean.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from configs.files import Shape, differences, read_json, read_sealed, write_atomically, write_json
from configs.schema import Config, LabError
from experiment.reading import check_config
from experiment.run import Run
from measure.report.tables import per_seed_values, with_tables

COVERAGE = CONFIDENCE = 0.95
MIN_HALF_WIDTH = 0.001  # a metric at its limit (0 of 6,298 words) has no deviation
# Keys of a config that set how it runs on a machine, not what it computes.
MACHINE = ("name:", "threads:", "workers:", "cost.", "checkpoint_")


class Values(Shape):
    """One metric of one model."""

    per_seed: list[float | None]


class Entry(Shape):
    """One model."""

    params: int
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
    bands: dict[str, Band] | None = None
    trace: dict[str, list[float]] | None = None


def read_result(path: Path) -> dict[str, Any]:
    """The evaluation of a run (its folder) or a committed result (a file). LabError if it is
    damaged or was changed."""
    if path.is_dir():
        return read_sealed(path / "eval.json", Result)
    return read_json(path, Result)


def tolerance_factor(n: int, coverage: float = COVERAGE) -> float:
    """k such that mean +- k standard deviations of n values is the tolerance interval; 3.379 for
    n = 10. Howe 1969, equation 3.2."""
    spread = stats.chi2.ppf(1 - CONFIDENCE, n - 1)
    z = stats.norm.ppf((1 + coverage) / 2)
    return z * math.sqrt((n - 1) * (1 + 1 / n) / spread)


def bands(results: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The band of every metric over the seeds of several results of one config; None for fewer
    than 10 of them."""
    pooled: dict[str, list[float]] = {}
    students = [(r["config"]["teacher"]["seed"], seed) for r in results for seed in r["seeds"]]
    if len(set(students)) < len(students):
        raise LabError(
            "two of these runs hold the same student (teacher.seed and seed), which would make the "
            "bands too narrow; remove one"
        )
    for result in results:
        for key, values in per_seed_values(result).items():
            pooled.setdefault(key, []).extend(values)
    if sum(len(result["seeds"]) for result in results) < 10:
        return None
    found = {}
    for key, values in pooled.items():
        if len(values) < 2:
            continue  # one teacher has no deviation
        mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
        factor = tolerance_factor(len(values), 1 - (1 - COVERAGE) / len(pooled))
        reach = max(factor * deviation, MIN_HALF_WIDTH)
        found[key] = {"values": values, "low": mean - reach, "high": mean + reach}
    return found


def other_configs(stored: dict[str, Any], config: Config, ignored: tuple[str, ...]) -> list[str]:
    """Where a stored config differs from this one, except in the keys `ignored`; missing keys have
    their defaults."""
    there = check_config(stored, "the stored config").model_dump(mode="json")
    found = differences(there, config.model_dump(mode="json"))
    return [line for line in found if not line.startswith(ignored)]


def write_reference(run: Run, config: Config, others: list[Path], folder: Path) -> None:
    """Write <folder>/<name>.json, with bands over this run and others that differ in seeds (run
    folders, or their results), and the tables of the README beside that folder."""
    results = [read_result(run.folder)]
    for other in others:
        results.append(read_result(other))
        ignored = (*MACHINE, "seeds:", "teacher.seed:")
        differing = other_configs(results[-1]["config"], config, ignored)
        if differing:
            raise LabError(f"{other} is a run of another config: {differing[0]}")
    reference = {**results[0], "bands": bands(results)}
    where = results[0]["environment"]
    if where["dirty"] or where["trained"]["dirty"]:
        print("made with uncommitted code: others cannot check out the code of this result")
    if reference["bands"] is None:
        print("fewer than 10 seeds: no bands written; name more runs with --bands")
    write_json(folder / f"{config.name}.json", reference)
    readme = folder.parent / "README.md"
    write_atomically(readme, with_tables(readme.read_text(encoding="utf-8"), folder))
