"""The story of a run: who learned what from whom, how well, and at what cost. The report and the
picture in the README tell it."""

from dataclasses import dataclass
from typing import Any

from measure.metrics import metrics_in
from measure.report.tables import (
    committed_runs,
    fidelity_shown,
    fixed,
    models_in,
    parameters,
    task_of,
    value_in,
)
from measure.verdicts import NOT_DISTINGUISHED
from tasks.task import Metric, Task
from teacher.access import ACCESS

SHOWN = 5  # students in the story; a study has more in its tables
MANY = 8  # students that are a study of methods

Verdict = dict[str, Any]


@dataclass(frozen=True)
class Card:
    """A model in the story. quality and closeness: as printed, closeness nothing for the teacher.
    share: of the teacher's training FLOPs, outputs included, as printed."""

    name: str
    learns: str
    params: str
    quality: str
    closeness: str
    share: str


def shown_students(result: dict[str, Any]) -> list[str]:
    """The students of the story, those with a teacher first: the dearest of each kind where budgets
    or purchases are compared; of many, the first of each kind of access and traces."""
    names = list(result["students"])
    compared = result.get("savings") or result.get("bought")
    if compared:
        names = [list(students)[-1] for students in compared["curves"].values()]
    elif len(names) > MANY:
        kinds: dict[tuple[str, str], str] = {}
        for name in names:
            recipe = result["students"][name]["recipe"]
            kinds.setdefault((recipe["access"], recipe["outputs"]["traces"]), name)
        names = list(kinds.values()) if len(kinds) > 2 else names
    return sorted(names, key=lambda name: not learns_from_teacher(result, name))[:SHOWN]


def models_side_by_side(result: dict[str, Any]) -> list[str]:
    """The models whose answers are shown."""
    return [
        "teacher",
        *shown_students(result),
        *(n for n in ["baseline"] if n in result["controls"]),
    ]


def learns_from_teacher(result: dict[str, Any], name: str) -> bool:
    return ACCESS[models_in(result)[name]["recipe"]["access"]].teacher


def cards(result: dict[str, Any]) -> dict[str, list[Card]]:
    """The teacher; students that learn from it; students and controls that learn without it."""
    controls = [name for name in ("baseline", "low_data") if name in result["controls"]]
    names = [*shown_students(result), *controls]
    taught = [name for name in names if learns_from_teacher(result, name)]
    return {
        "teacher": [card(result, "teacher")],
        "taught": [card(result, name) for name in taught],
        "untaught": [card(result, name) for name in names if name not in taught],
    }


def card(result: dict[str, Any], name: str) -> Card:
    entry = models_in(result)[name]
    costs = result["cost"]["fraction_of_teacher_by_student"].get(name)
    share = costs["flops"] if costs else None
    return Card(
        name=name,
        learns=learns_from(result, name, entry),
        params=f"{parameters(entry)} parameters",
        quality=shown(result, entry, task_of(result).headline),
        closeness="" if name == "teacher" else shown(result, entry, fidelity_shown(result)),
        share=f"{100 * share:.1f} %" if share is not None else "",
    )


def learns_from(result: dict[str, Any], name: str, entry: dict[str, Any]) -> str:
    """`6,000 words: its answers, as a chat API returns them`."""
    items = task_of(result).item_noun
    count = f"{entry['rows']:,} {items}" if entry.get("rows") else items
    if name == "teacher" or entry["recipe"]["access"] == "none":
        return f"{count} of the data"
    if entry["recipe"]["sequences"] == "student":
        count = f"{items} that it answers itself"
    revealed = revealed_by(entry["recipe"]["access"], task_of(result))
    return f"{count}: {revealed}"


def revealed_by(access: str, task: type[Task]) -> str:
    """`its answers with its whole distribution at each token`, or at each image."""
    return ACCESS[access].meaning.replace("each token", f"each {task.position_noun}")


def shown(result: dict[str, Any], entry: dict[str, Any], name: str) -> str:
    """`56.1 % word errors`, `0.284 nats KL to teacher`; nothing if it was not measured."""
    metric, value = metrics_in(result)[name], value_in(entry, name)
    if value is None:
        return ""
    return f"{fixed(metric.scale * value['mean'], metric.digits)} {metric.unit} {metric.heading}"


# -- the conclusion --------------------------------------------------------------------------------


def conclusion(result: dict[str, Any]) -> list[str]:
    """Two sentences: how close the students come to the teacher at what cost, and what the claims
    show of them."""
    return [closeness(result), *found(result), *saved(result)]


def closeness(result: dict[str, Any]) -> str:
    """The first students and `baseline` in the metric that stands for fidelity."""
    name, models = fidelity_shown(result), models_in(result)
    metric, parts = metrics_in(result)[name], []
    for model in [*shown_students(result), *(n for n in ["baseline"] if n in models)]:
        value = value_in(models[model], name)
        if value is not None:
            number = fixed(metric.scale * value["mean"], metric.digits)
            parts.append(f"{number} {metric.unit} ({model})")
    where = "validation" if result["split"] == "validation" else "held-out"
    subject = f"{metric.heading} on {where} {task_of(result).item_noun} is {listed(parts)}."
    shares = [
        100 * share["flops"]
        for model, share in result["cost"]["fraction_of_teacher_by_student"].items()
        if model in shown_students(result) and share["flops"] is not None
    ]
    if not shares:
        return subject[0].upper() + subject[1:]
    ends = dict.fromkeys(f"{share:.1f}" for share in (min(shares), max(shares)))
    return f"At {' to '.join(ends)} % of the teacher's training FLOPs, outputs included, {subject}"


def found(result: dict[str, Any]) -> list[str]:
    """What the claims about the reference show, in the headline's metric if it is claimed."""
    reference, claims = claims_about(result)
    if not claims:
        return []
    metrics = metrics_in(result)
    by_metric: dict[str, list[Verdict]] = {}
    for verdict in claims:
        by_metric.setdefault(verdict["metric"], []).append(verdict)
    headline = task_of(result).headline
    name = headline if headline in by_metric else next(iter(by_metric))
    seeds = max(verdict["seeds"] for verdict in by_metric[name])
    where = f"Over {seeds} seeds" if seeds > 1 else "In this one run"
    parts = []
    for word, names in in_groups(by_metric[name]).items():
        verb = "are" if len(names) > 1 else "is"
        shown = listed(names) if len(names) <= SHOWN else f"{len(names)} students"
        joined = "from" if word == NOT_DISTINGUISHED else "than"
        other = "" if parts else f" {joined} {reference}"  # in the first clause
        parts.append(f"{shown} {verb} {word}{other}")
    return [f"{where}, in {metrics[name].heading}, {'; '.join(parts)}."]


def saved(result: dict[str, Any]) -> list[str]:
    """What each kind of student needs for the same quality, where budgets are compared."""
    savings, metrics = result.get("savings"), metrics_in(result)
    sentences = []
    for name, targets in (savings or {"needs": {}})["needs"].items():
        parts = []
        for kind in savings["curves"]:
            needs = [needed[kind] for needed in targets.values() if kind in needed]
            ratios = [need["flops"]["ratio"] for need in needs if not isinstance(need, str)]
            if kind != savings["reference"] and ratios:
                ends = dict.fromkeys(f"{ratio:.2f}" for ratio in (min(ratios), max(ratios)))
                known = f"known at {len(ratios)} of {len(needs)} budgets"
                parts.append(f"{kind} {' to '.join(ends)} ({known})")
        if parts:
            sentences.append(
                f"FLOPs for the same {metrics[name].heading}, as a ratio to those of "
                f"{savings['reference']} (below 1 is cheaper): {listed(parts)}."
            )
    return sentences


def claims_about(result: dict[str, Any]) -> tuple[str, list[Verdict]]:
    """The model that most students are compared with, `baseline` if there is one, and the verdicts
    on whether they beat it."""
    verdicts = [
        v for v in result["verdicts"]
        if " beats " in v["claim"] and not v["threshold"] and not v["exploratory"]
        if v["split"] == result["split"] and v["claim"].split()[0] in result["students"]
    ]  # fmt: skip
    others = [v["claim"].split()[2] for v in verdicts]
    if not others:
        return "", []
    reference = "baseline" if "baseline" in others else max(others, key=others.count)
    return reference, [v for v in verdicts if v["claim"].split()[2] == reference]


def in_groups(verdicts: list[Verdict]) -> dict[str, list[str]]:
    """{`better`, `worse`, …: names of the students}, in this order."""
    found: dict[str, list[str]] = {"better": [], "worse": []}
    for verdict in verdicts:
        found.setdefault(verdict["here"] or verdict["result"], []).append(
            verdict["claim"].split()[0]
        )
    return {word: names for word, names in found.items() if names}


def where_worse(result: dict[str, Any]) -> list[str]:
    """A line per student: the metrics in which it is worse than the reference, with differences;
    where budgets are compared, a line per kind of student that needs more."""
    reference, claims = claims_about(result)
    metrics, lines = metrics_in(result), {}
    for verdict in claims:
        if (verdict["here"] or verdict["result"]) != "worse":
            continue
        metric = metrics[verdict["metric"]]
        size = fixed(metric.scale * abs(verdict["difference"]), metric.digits)
        parts = [f"{size} {metric.difference_unit}", committed_runs(verdict, metric)]
        part = f"{metric.heading} ({'; '.join(filter(None, parts))})"
        lines.setdefault(verdict["claim"].split()[0], []).append(part)
    worse = [f"{name} is worse than {reference} in {listed(p)}" for name, p in lines.items()]
    if len(worse) > SHOWN:
        worse = worse_by_metric(reference, claims, metrics)
    return worse + dearer(result)


def worse_by_metric(reference: str, claims: list[Verdict], metrics: dict[str, Metric]) -> list[str]:
    """A line per metric: the students that are worse in it, the least first."""
    lines = []
    for name in dict.fromkeys(verdict["metric"] for verdict in claims):
        about, metric = [v for v in claims if v["metric"] == name], metrics[name]
        worse = [v for v in about if (v["here"] or v["result"]) == "worse"]
        worse.sort(key=lambda verdict: abs(verdict["difference"]))
        shown = [
            f"{v['claim'].split()[0]} ({fixed(metric.scale * abs(v['difference']), metric.digits)})"
            for v in worse
        ]
        if shown:
            lines.append(
                f"{len(worse)} of {len(about)} students are worse than {reference} in "
                f"{metric.heading}, by {metric.difference_unit}: {listed(shown)}"
            )
    return lines


def dearer(result: dict[str, Any]) -> list[str]:
    """At which budgets a kind of student needs more than the reference, by its interval."""
    savings, metrics, lines = result.get("savings") or {"needs": {}}, metrics_in(result), []
    for name, targets in savings["needs"].items():
        for kind in savings["curves"]:
            more = [
                student
                for student, needs in targets.items()
                if not isinstance(needs.get(kind, ""), str) and needs[kind]["flops"]["ci95"][0] > 1
            ]
            if more and kind != savings["reference"]:
                heading = metrics[name].heading
                lines.append(f"{kind} needs more FLOPs for the {heading} of {listed(more)}")
    return lines


def listed(parts: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *others, last = parts or [""]
    return f"{', '.join(others)} and {last}" if others else last
