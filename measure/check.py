"""Does a run hold? Compared with the committed result of its config, or with another run.

A run on another machine can not be equal to the bit: the order of float32 sums differs between
thread counts and processors. So a check first says what to expect, and then which tier was met:

A   bit-equal: every model and every outputs shard has the committed hash
B   a float64 trace: every loss equal to 1e-9, on any CPU, thread count and operating system
C   every metric inside the committed band
D   different, or made from other rows or with another tokenizer

The bands are two-sided normal tolerance intervals over the seeds of reference runs (Howe 1969,
JASA 64, 610-620): with 95 % confidence they hold all m metrics of 95 % of all seeds at once, so
each has a coverage of 1 - 5 % / m (Bonferroni). A rerun is accepted by reference runs, not by a
guess, as in MLPerf's reference convergence points (Mattson et al. 2020, arXiv 1910.01500, section
3.3). Every seed of a rerun must lie in the band, not their mean alone.
"""

import math
from typing import Any

import numpy as np
from scipy import stats

from configs.runs import Run, differences
from configs.schema import LabError
from measure.tables import arms_in

COVERAGE = CONFIDENCE = 0.95
FLOOR = 0.001  # least half-width: a metric at its end (0 of 6,298 words) has no deviation to tell
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


def tolerance_factor(n: int, coverage: float = COVERAGE) -> float:
    """k such that mean +- k standard deviations of n values is the tolerance interval; 3.379 for
    n = 10. Howe 1969, equation 3.2."""
    spread = stats.chi2.ppf(1 - CONFIDENCE, n - 1)
    z = stats.norm.ppf((1 + coverage) / 2)
    return z * math.sqrt((n - 1) * (1 + 1 / n) / spread)


def metrics_of(result: dict[str, Any]) -> dict[str, list[float]]:
    """{"distilled sequence_agreement": one value per seed} of all arms and splits."""
    found = {}
    for arm, entry in arms_in(result).items():
        for split in (entry, entry.get("long", {})):
            for group in ("quality", "fidelity"):
                for name, metric in split.get(group, {}).items():
                    key = f"{arm} {name}" + ("" if split is entry else " (long words)")
                    found[key] = metric["per_seed"]
    return found


def bands(results: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The band of every metric over the seeds of several results of one config; None for fewer
    than 10 of them."""
    pooled: dict[str, list[float]] = {}
    students = [(r["config"]["teacher"]["seed"], seed) for r in results for seed in r["seeds"]]
    if len(set(students)) < len(students):
        raise LabError(
            "two of these runs hold the same student (teacher.seed and seed): a band of runs that "
            "repeat each other is too narrow; leave one away"
        )
    for result in results:
        for key, values in metrics_of(result).items():
            pooled.setdefault(key, []).extend(values)
    if sum(len(result["seeds"]) for result in results) < 10:
        return None
    found = {}
    for key, values in pooled.items():
        if len(values) < 2:
            continue  # one teacher says nothing of how teachers differ
        mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
        factor = tolerance_factor(len(values), 1 - (1 - COVERAGE) / len(pooled))
        reach = max(factor * deviation, FLOOR)
        found[key] = {"values": values, "low": mean - reach, "high": mean + reach}
    return found


def expected_tier(environments: list[dict[str, Any]], precision: str) -> tuple[str, str]:
    """The tier to expect from all the environments that two runs were trained in, and why."""
    flat = [{**e, **e["packages"]} for e in environments]
    differing = [key for key in BITS if any(e.get(key) != flat[0].get(key) for e in flat)]
    if not differing:
        return "A", "same code, torch, processor and threads"
    why = "another " + ", ".join(differing)
    return ("B" if precision == "float64" else "C"), why


def check(result: dict[str, Any], reference: dict[str, Any]) -> tuple[str, list[str]]:
    """(tier, four lines) of a run's result against the committed one of the same config."""
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
    parted = trace_parts(result.get("trace") or {}, reference.get("trace") or {})
    figures = metrics_of(result) == metrics_of(reference)
    data = all(key in same for key in ("rows", "tokenizer") if key in hashes)
    data &= result.get("rows") == reference.get("rows", result.get("rows"))
    if len(same) == len(hashes) == len(result["artifacts"]) and figures and data:
        tier = "A"
    elif precision == "float64":
        tier = "B" if data and reference.get("trace") and not parted else "D"
    else:
        tier = "C" if data and inside and not outside else "D"
    first = next((key for key in hashes if key not in same), None if figures else "the metrics")
    lines = [
        f"expected  tier {expected}: {why}",
        f"hashes    {len(same)} of {len(hashes)} equal" + (f", not {first}" if first else ""),
        trace_line(parted, reference) if precision == "float64" else band_line(inside, outside),
        f"tier      {tier}: {MEANINGS[tier]}"
        + (f", where {expected} was expected" if expected < tier < "D" else ""),
    ]
    return tier, lines


MEANINGS = {
    "A": "equal bit for bit",
    "B": "every loss equal to 1e-9",
    "C": "every metric inside the committed band",
    "D": "DIFFERENT",
}


def inside_bands(result: dict[str, Any], reference: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Metrics whose every seed lies in the band, and those outside, the worst first."""
    found = metrics_of(result)
    misses = {}
    for key, band in (reference.get("bands") or {}).items():
        middle, half = (band["high"] + band["low"]) / 2, (band["high"] - band["low"]) / 2
        values = np.asarray(found.get(key, [math.nan]), float)  # a metric that is gone is outside
        misses[key] = float(np.max(np.nan_to_num(np.abs(values - middle), nan=math.inf))) - half
    outside = sorted((key for key in misses if misses[key] > 0), key=lambda key: -misses[key])
    return [key for key in misses if misses[key] <= 0], outside


def band_line(inside: list[str], outside: list[str]) -> str:
    if not inside and not outside:
        return "bands     none are committed for this config: hashes alone can tell"
    text = f"bands     {len(inside)} of {len(inside) + len(outside)} metrics inside"
    return text + (f", outside: {', '.join(outside[:3])}" if outside else "")


def trace_parts(trace: dict[str, list[float]], reference: dict[str, list[float]]) -> list[str]:
    """`stage at step n: loss there, loss here` for every stage whose losses part."""
    parted = [f"{stage}: not there" for stage in trace if stage not in reference]
    for stage, expected in reference.items():
        found = trace.get(stage, [])
        if len(found) != len(expected):
            parted.append(f"{stage}: {len(found)} steps here, {len(expected)} there")
            continue
        apart = ~(np.abs(np.subtract(found, expected)) <= TRACE_TOLERANCE)  # nan too
        if apart.any():
            step = int(apart.argmax())
            parted.append(f"{stage} at step {step + 1}: {found[step]!r} and {expected[step]!r}")
    return parted


def trace_line(parted: list[str], reference: dict[str, Any]) -> str:
    losses = reference.get("trace") or {}
    stages, steps = len(losses), sum(map(len, losses.values()))
    if parted:
        return f"trace     parts in {len(parted)} of {stages} stages, first {parted[0]}"
    return f"trace     {steps} losses of {stages} stages equal to {TRACE_TOLERANCE:g}"


def compare_runs(a: Run, b: Run) -> list[str]:
    """What differs between two runs, in order of likely cause, and where their losses part."""
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
        lines.append(f"{cause:<9} {'same' if not found else '; '.join(found[:3])}")
        if len(found) > 3:
            lines[-1] += f"; and {len(found) - 3} more"
    hashes = artifacts_of(a), artifacts_of(b)
    common = [key for key in hashes[0] if key in hashes[1]]
    same = [key for key in common if hashes[0][key] == hashes[1][key]]
    lines.append(f"{'hashes':<9} {len(same)} of {len(common)} equal")
    traces = losses_of(a), losses_of(b)
    stages = dict.fromkeys([*traces[0], *traces[1]])
    parted = [line for stage in stages for line in where_they_part(stage, *traces)]
    if parted:
        lines.append(f"{'losses':<9} part: " + "; ".join(parted[:3]))
    else:
        lines.append(f"{'losses':<9} equal")
    return lines


def where_they_part(stage: str, a: dict, b: dict) -> list[str]:
    """The first logged step of a stage at which two runs have other losses, or only one has any."""
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
    """The sha256 of everything that a run was made from and has made: rows, tokenizer, models,
    outputs."""
    stages = run.manifest["stages"].items()
    made = {stage: made["sha256"] for stage, made in stages if "sha256" in made}
    return {**run.manifest.get("data", {}), **made}
