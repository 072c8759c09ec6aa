"""Check a run against the committed result of its config, or compare it with another run.

A run on another machine cannot be bit-equal: the order of float32 sums differs between thread
counts and processors. So a check first states which tier to expect, then which one was met:

A   bit-equal: every model and every outputs shard has the committed hash
B   a float64 trace: every loss equal to 1e-9, on any CPU, thread count and operating system
C   every metric and every claim's difference inside the committed band, and the same verdicts
D   different, or made from other rows or with another tokenizer
?   undecided: other hashes, and no bands to compare figures with
"""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from configs.files import differences, say, write_atomically
from configs.schema import MACHINE_KEYS, Config, LabError, nearest
from experiment.environment import evaluation_sha256
from experiment.experiment import verify_stage
from experiment.reference import other_configs, read_result
from experiment.run import Run
from measure.report.page import render_check
from measure.report.tables import models_table, per_seed_values
from measure.verdicts import claim_of

TRACE_TOLERANCE = 1e-9
# What changes the last bits of float32, in order of likelihood.
BITS = (
    "code",
    "torch",
    "transformers",
    "numpy",
    "threads",
    "workers",
    "processes",
    "cpu",
    "cpu_capability",
    "gpu",
    "platform",
)


def expected_tier(environments: list[dict[str, Any]], precision: str) -> tuple[str, str]:
    """The tier to expect from all the environments that two runs were trained in, and why."""
    flat = [{**e, **e["packages"]} for e in environments]
    differing = [key for key in BITS if any(e.get(key) != flat[0].get(key) for e in flat)]
    if not differing:
        return "A", "same code, torch, processor and threads"
    why = "different " + ", ".join(differing)
    return ("B" if precision == "float64" else "C"), why


def check(result: dict[str, Any], reference: dict[str, Any]) -> tuple[str, list[str]]:
    """(tier, five lines) of a run's result against the committed result of the same config."""
    precision = reference["config"].get("precision", "float32")
    environments = [
        e
        for one in (result["environment"], reference["environment"])
        for e in (one["trained"], *one.get("earlier", []))
    ]
    expected, why = expected_tier(environments, precision)
    hashes = reference["artifacts"]
    same = [key for key, value in hashes.items() if result["artifacts"].get(key) == value]
    inside, outside = inside_bands(result, reference)
    changed = changed_verdicts(result, reference)
    diverged = trace_differences(result.get("trace") or {}, reference.get("trace") or {})
    equal_figures = per_seed_values(result) == per_seed_values(reference)
    data = all(key in same for key in ("rows", "tokenizer") if key in hashes)
    data &= result.get("rows") == reference.get("rows", result.get("rows"))
    if changed and (inside or outside or precision == "float64" or equal_figures):
        tier = "D"
    elif len(same) == len(hashes) == len(result["artifacts"]) and equal_figures and data:
        tier = "A"
    elif precision == "float64":
        tier = "B" if data and reference.get("trace") and not diverged else "D"
    elif not data:
        tier = "D"
    elif not inside and not outside:
        tier = "?"
    else:
        tier = "D" if outside else "C"
    first = next(
        (key for key in hashes if key not in same), None if equal_figures else "the metrics"
    )
    lines = [
        f"expected  tier {expected}: {why}",
        f"hashes    {len(same)} of {len(hashes)} equal" + (f", not {first}" if first else ""),
        trace_line(diverged, reference) if precision == "float64" else band_line(inside, outside),
        verdict_line(changed, reference),
        f"tier      {tier}: {MEANINGS[tier]}"
        + (f", where {expected} was expected" if expected < tier < "D" else ""),
    ]
    return tier, lines


MEANINGS = {
    "A": "equal bit for bit",
    "B": "every loss equal to 1e-9",
    "C": "every metric inside the committed band, and the same verdicts",
    "D": "DIFFERENT",
    "?": "UNDECIDED: the hashes differ, and no bands are committed to compare figures with",
}
EXIT_CODES = {"D": 1, "?": 2}


def inside_bands(result: dict[str, Any], reference: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Metrics and differences with every seed inside the band, and those outside, worst first."""
    found = per_seed_values(result)
    misses = {}
    for key, band in (reference.get("bands") or {}).items():
        middle, half = (band["high"] + band["low"]) / 2, (band["high"] - band["low"]) / 2
        values = np.asarray(found.get(key, [math.nan]), float)  # a missing metric is outside
        misses[key] = float(np.max(np.nan_to_num(np.abs(values - middle), nan=math.inf))) - half
    outside = [key for key in misses if not misses[key] <= 0]  # nan too
    outside.sort(key=lambda key: -misses[key])
    return [key for key in misses if key not in outside], outside


def changed_verdicts(result: dict[str, Any], reference: dict[str, Any]) -> list[str]:
    """`claim: result there, result here` of each verdict that differs."""
    here = {claim_of(verdict): verdict["result"] for verdict in result["verdicts"]}
    there = {claim_of(verdict): verdict["result"] for verdict in reference["verdicts"]}
    return [
        f"{claim}: {there.get(claim, 'none')} there, {here.get(claim, 'none')} here"
        for claim in dict.fromkeys([*there, *here])
        if here.get(claim) != there.get(claim)
    ]


def verdict_line(changed: list[str], reference: dict[str, Any]) -> str:
    count = len(reference["verdicts"])
    if not changed:
        return f"verdicts  {count} of {count} the same"
    return f"verdicts  {len(changed)} of {count} changed, first {changed[0]}"


def band_line(inside: list[str], outside: list[str]) -> str:
    if not inside and not outside:
        return "bands     none are committed for this config: only hashes can decide"
    count = len(inside) + len(outside)
    text = f"bands     {len(inside)} of {count} metrics and differences inside"
    return text + (f", outside: {', '.join(outside[:3])}" if outside else "")


def trace_differences(
    trace: dict[str, list[float]], reference: dict[str, list[float]]
) -> list[str]:
    """`stage at step n: loss there, loss here` for every stage whose losses differ."""
    differing = [f"{stage}: not there" for stage in trace if stage not in reference]
    for stage, expected in reference.items():
        found = trace.get(stage, [])
        if len(found) != len(expected):
            differing.append(f"{stage}: {len(found)} steps here, {len(expected)} there")
            continue
        apart = ~(np.abs(np.subtract(found, expected)) <= TRACE_TOLERANCE)  # nan too
        if apart.any():
            step = int(apart.argmax())
            differing.append(f"{stage} at step {step + 1}: {found[step]!r} and {expected[step]!r}")
    return differing


def trace_line(diverged: list[str], reference: dict[str, Any]) -> str:
    losses = reference.get("trace") or {}
    stages, steps = len(losses), sum(map(len, losses.values()))
    if diverged:
        return f"trace     differs in {len(diverged)} of {stages} stages, first {diverged[0]}"
    return f"trace     {steps} losses of {stages} stages equal to {TRACE_TOLERANCE:g}"


def compare_runs(a: Run, b: Run) -> list[str]:
    """What differs between two runs, in order of likely cause, and where their losses diverge."""
    here, there = a.manifest["environment"], b.manifest["environment"]
    config_a, config_b = (run.config().model_dump(mode="json") for run in (a, b))
    seeds = [(c.pop("seeds"), c["teacher"].pop("seed")) for c in (config_a, config_b)]
    machine = ("platform", "cpu", "cpu_capability", "gpu", "cores")
    shares = ("threads", "workers", "processes")
    causes = {
        "code": differences(*({k: e.get(k) for k in ("code", "dirty")} for e in (here, there))),
        "config": differences(config_a, config_b),
        "versions": differences(
            {"python": here["python"], **here["packages"]},
            {"python": there["python"], **there["packages"]},
        ),
        "machine": differences(*({k: e.get(k) for k in machine} for e in (here, there))),
        "threads": differences(*({k: e.get(k) for k in shares} for e in (here, there))),
        "data": differences(a.manifest.get("data"), b.manifest.get("data")),
        "seeds": differences(*({"students": s, "teacher": t} for s, t in seeds)),
    }
    lines = []
    for cause, found in causes.items():
        lines.append(f"{cause:<9} {'; '.join(found) or 'same'}")
    hashes = artifacts_of(a), artifacts_of(b)
    common = [key for key in hashes[0] if key in hashes[1]]
    same = [key for key in common if hashes[0][key] == hashes[1][key]]
    lines.append(f"{'hashes':<9} {len(same)} of {len(common)} equal")
    traces = losses_of(a), losses_of(b)
    stages = dict.fromkeys([*traces[0], *traces[1]])
    diverged = [line for stage in stages for line in first_difference(stage, *traces)]
    if diverged:
        lines.append(f"{'losses':<9} diverge: " + "; ".join(diverged[:3]))
    else:
        lines.append(f"{'losses':<9} equal")
    return lines + compare_metrics(a, b)


def compare_metrics(a: Run, b: Run) -> list[str]:
    """A line for each model of both runs whose metrics differ as they are printed."""
    if not all((run.folder / "eval.json").exists() for run in (a, b)):
        return [f"{'metrics':<9} not compared: evaluate both runs first"]
    (_, headings, rows), (_, others, there) = (
        models_table(read_result(run.folder), interval=False) for run in (a, b)
    )
    if headings != others:
        return [f"{'metrics':<9} not compared: the tasks have different ones"]
    by_model = {row[0]: row for row in there}
    lines = []
    for row in rows:
        cells = zip(headings, row, by_model.get(row[0], row), strict=True)
        found = [f"{heading} {x} and {y}" for heading, x, y in cells if x != y]
        if found:
            lines.append(f"{'metrics':<9} {row[0]}: {', '.join(found)}")
    return lines or [f"{'metrics':<9} equal, as printed"]


def first_difference(stage: str, a: dict, b: dict) -> list[str]:
    """The first logged step of a stage at which two runs differ in loss, or only one has a loss."""
    here, there = a.get(stage, {}), b.get(stage, {})
    for step in sorted(here.keys() | there.keys()):
        if here.get(step) != there.get(step):
            both = (
                f"{losses[step]:.6g}" if step in losses else "nothing" for losses in (here, there)
            )
            return [f"{stage} by step {step} ({' and '.join(both)})"]
    return []


def losses_of(run: Run) -> dict[str, dict[int, float]]:
    """{stage: {step: loss}} as logged."""
    found: dict[str, dict[int, float]] = {}
    for line in run.metrics():
        found.setdefault(line["stage"], {})[line["step"]] = line["loss"]
    return found


def artifacts_of(run: Run) -> dict[str, str]:
    """The sha256 of all inputs and products of a run: rows, tokenizer, models, outputs."""
    stages = run.manifest["stages"].items()
    made = {stage: made["sha256"] for stage, made in stages if "sha256" in made}
    return {**run.manifest.get("data", {}), **made}


# -- the command -----------------------------------------------------------------------------------


def check_run(
    run: Run, config: Config, name: str, results: Path, evaluate: Callable[[], None]
) -> int:
    """Compare a run with results/<name>.json and print the lines of the check; 0 if it holds, 1 if
    it is different, 2 if undecided. Every model and shard is verified; a missing or
    outdated eval.json is recomputed by `evaluate`."""
    file = results / f"{name}.json"
    if not file.exists():
        known = [found.stem for found in results.glob("*.json")]
        raise LabError(f"no {file} to check against{nearest(name, known)}; there are {known}")
    reference = read_result(file)
    differing = other_configs(reference["config"], config, MACHINE_KEYS)
    if differing:
        raise LabError(f"{run.folder} has another config than {file}: {differing[0]}")
    for stage in run.manifest["stages"]:
        verify_stage(run, stage)
    if not is_current(run):
        evaluate()
    result = read_result(run.folder)
    tier, lines = check(result, reference)
    say("\n".join(lines))
    try:
        write_atomically(run.folder / "check.html", render_check(result, reference, lines))
    except OSError as error:  # a read-only folder
        print(f"check.html is not written: {error}", file=sys.stderr)
    return EXIT_CODES.get(tier, 0)


def is_current(run: Run) -> bool:
    """Whether eval.json was made from exactly these models and outputs, by exactly this code."""
    if not (run.folder / "eval.json").exists():
        return False
    result = read_result(run.folder)
    same_code = result.get("environment", {}).get("evaluation") == evaluation_sha256()
    return same_code and result.get("artifacts") == artifacts_of(run)
