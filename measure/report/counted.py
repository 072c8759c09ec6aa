"""Tables of studies that count: detectors over made-up traffic, and evidence in students."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from measure.rates import Rate
from measure.report.tables import ShownTable

RIGHT_OR_WRONG = ("right", "wrong", "nobody")


def tables_of_study(study: dict[str, Any]) -> list[ShownTable]:
    return [*(tables_of_detectors(study) if "detectors" in study else tables_of_evidence(study))]


def rate(summary: dict[str, Any]) -> str:
    return str(Rate(summary["found"], summary["of"]))


def tables_of_detectors(study: dict[str, Any]) -> Iterator[ShownTable]:
    nominal = study["false_alarms"]
    for rule in next(iter(study["detectors"].values()))["rates"]:
        kinds = next(iter(study["detectors"].values()))["rates"][rule]
        yield (
            f"Accounts with an alarm of the rule {rule}, at a nominal {nominal:.0%} of customers",
            ["", *study["detectors"]],
            [
                [kind, *(rate(one["rates"][rule][kind]) for one in study["detectors"].values())]
                for kind in kinds
            ],
        )
    attacks = next(iter(study["detectors"].values()))["tokens"]
    yield (
        "How well the final scores tell extractors from customers, and how many tokens half of the "
        "extractors of each kind have at the most when the sequential alarm comes",
        ["", *study["detectors"]],
        [
            ["AUC", *(f"{one['auc']:.3f}" for one in study["detectors"].values())],
            *(
                [kind, *(middle(one["tokens"][kind]) for one in study["detectors"].values())]
                for kind in attacks
            ),
        ],
    )
    if study["supervised"]:
        yield (
            "Extractors that gradient boosting finds, trained on other logs without their kind, "
            "and with all kinds, which is circular",
            ["left out", "found"],
            [
                ["nothing" if name == "all" else name, rate(found)]
                for name, found in study["supervised"].items()
            ],
        )


def middle(quartiles: list[float] | None) -> str:
    return f"{quartiles[1]:,.0f}" if quartiles else "no alarm"


def tables_of_evidence(study: dict[str, Any]) -> Iterator[ShownTable]:
    marks = study["marks"]
    lengths = next(iter(marks.values()))["power"]
    yield (
        f"The watermark in what students write: z of {study['tokens']:,} tokens, the mean and the "
        "range of all runs and seeds, and in how many shorter texts p is at most 0.001",
        ["student", "z", *(f"{int(tokens):,} tokens" for tokens in lengths)],
        [
            [name, ranged(one["z"]), *(share(found) for found in one["power"].values())]
            for name, one in marks.items()
        ],
    )
    tests = {
        "null": "this project's", "library": "transformers' detector",
        "library_once": "the same, each pair of tokens once",
    }  # fmt: skip
    yield (
        "Texts of innocent students, tested with random keys",
        ["test", "texts", "standard deviation of z", "accused at p <= 0.001"],
        [
            [name, f"{one['texts']:,}", f"{one['spread']:.2f}", f"{one['false']:.1%}"]
            for name, one in ((name, study[key]) for key, name in tests.items())
        ],
    )
    for reach, kinds in study["teachers"].items():
        yield (
            f"The teacher that is accused, at p <= 0.001, where the student's {REACH[reach]}",
            ["student", *RIGHT_OR_WRONG],
            [[name, *counted(found)] for name, found in kinds.items()],
        )
    for test, recipes in study["accounts"].items():
        yield (
            f"The account that is named by {test}, at p <= 0.001",
            ["student", *RIGHT_OR_WRONG],
            [[name, *counted(found)] for name, found in recipes.items()],
        )


REACH = {
    "weights": "distributions are known",
    "scores": "scores of given texts are known",
    "text": "answers alone are known",
}


def counted(found: dict[str, int]) -> list[str]:
    return [str(found.get(name, 0)) for name in RIGHT_OR_WRONG]


def share(summary: dict[str, Any]) -> str:
    return f"{summary['found'] / summary['of']:.0%} of {summary['of']}" if summary["of"] else "-"


def ranged(values: list[float]) -> str:
    return f"{np.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"
