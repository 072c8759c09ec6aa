"""Simulated runs: how often intervals cover the truth, and how often verdicts err.

    python -m tests.simulations     # rewrites the tables of docs/statistics.md

Two models are evaluated on the same rows. What a row adds to both is common, the rest of its
variance is that of each model, half of it the same for all seeds. The spread between seeds is given
as a multiple of the standard error that the rows cause.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from measure.statistics import Estimate, level_of_one
from measure.verdicts import Comparison, decide
from tests.helpers import drawn

DOCS = Path(__file__).parent.parent / "docs" / "statistics.md"
SEEDS, RATIOS, ROWS = (2, 3, 5, 10), (0.0, 1.0, 2.4), 60
RUNS = 4000


def pairs(
    seeds: int, ratio: float, runs: int, truth: float = 0.0, models: int = 2
) -> Iterator[list[Estimate]]:
    """Models of simulated runs; the first is better by `truth`. The same for the same arguments."""
    generator = np.random.default_rng([seeds, round(10 * ratio), models])
    between = ratio * 0.3 / math.sqrt(ROWS)
    for _ in range(runs):
        row = 0.3 * generator.standard_normal(ROWS)
        yield [
            drawn(generator, seeds, ROWS, 0.5 + level, between, common=0.5, row=row)
            for level in (truth, *[0.0] * (models - 1))
        ]


def coverage(seeds: int, ratio: float, runs: int = RUNS) -> float:
    """Of the 95 % interval of a paired difference."""
    intervals = ((first - second).interval for first, second in pairs(seeds, ratio, runs))
    return float(np.mean([low <= 0 <= high for low, high in intervals]))


def decided(
    result: str,
    seeds: int,
    ratio: float = 1.0,
    runs: int = RUNS,
    *,
    truth: float = 0.0,
    verb: str = "beats",
    threshold: float = 0.0,
    methods: int = 1,
) -> float:
    """How often a claim has this result, of one method or of any of several against one model."""
    found = 0
    for *firsts, second in pairs(seeds, ratio, runs, truth, methods + 1):
        claims = [
            Comparison(f"a {verb} b", "accuracy", 1, threshold, first, second) for first in firsts
        ]
        found += any(decide(claim, level_of_one(methods)) == result for claim in claims)
    return found / runs


def detectable(seeds: int, ratio: float, runs: int = 200) -> float:
    """The difference that is found with power 0.8, by the variances of simulated runs."""
    squares = [
        (first - second).detectable(0.05) ** 2 for first, second in pairs(seeds, ratio, runs)
    ]
    return math.sqrt(float(np.mean(squares)))  # variances are unbiased, deviations are not


def table(headings: list[str], rows: list[list[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def coverage_table() -> str:
    ratios = [f"spread between seeds {ratio:g} x that of rows" for ratio in RATIOS]
    rows = [
        [f"{seeds} seeds", *(f"{100 * coverage(seeds, ratio):.1f} %" for ratio in RATIOS)]
        for seeds in SEEDS
    ]
    return table(["", *ratios], rows)


def error_table() -> str:
    """False claims where there is no difference, and power."""
    rows = []
    for seeds in SEEDS:
        size = detectable(seeds, 1.0)
        false = 1 - decided("not distinguished", seeds)
        match = decided("matches", seeds, truth=0.1, verb="matches", threshold=0.1)
        rows.append(
            [
                f"{seeds} seeds",
                f"{100 * false:.1f} %",
                f"{100 * decided('better', seeds, runs=1000, methods=8):.1f} %",
                f"{100 * match:.1f} %",
                f"{size / (0.3 / math.sqrt(ROWS)):.1f}",
                f"{100 * decided('better', seeds, truth=size):.0f} %",
            ]
        )
    headings = [
        "", "equal models called different", "one of 8 equal methods called better",
        "models a margin apart called a match", "detectable difference, in standard errors of rows",
        "found in",
    ]  # fmt: skip
    return table(headings, rows)


def with_tables(text: str) -> str:
    """The document with its tables computed again."""
    for name, made in (("coverage", coverage_table), ("errors", error_table)):
        block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = block.sub(lambda match, made=made: f"{match[1]}{made()}\n{match[2]}", text)
    return text


if __name__ == "__main__":
    DOCS.write_text(with_tables(DOCS.read_text(encoding="utf-8")), encoding="utf-8")
