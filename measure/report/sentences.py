"""Results as sentences: the same in the console, the documents and the report."""

from typing import Any

from measure.laws import Law
from measure.metrics import DIVERGENCE, metrics_in
from measure.report.tables import (
    by_split,
    claims_by_pair,
    compared_in,
    fixed,
    had_the_machine,
    models_in,
    task_of,
)
from measure.verdicts import verdict_line


def facts_of(result: dict[str, Any]) -> list[str]:
    """Verdicts except those in the table, gaps closed and cost, a line each."""
    metrics = metrics_in(result)
    stated = [(v["claim"], v["metric"]) for v in result["config"].get("verdicts", [])]
    in_table = [id(v) for claims in claims_by_pair(result).values() for v in claims.values()]
    facts = [
        verdict_line(verdict, metrics, task_of(result).item_noun)
        for verdict in result["verdicts"]
        if (verdict["claim"], verdict["metric"]) in stated or not compared_in(result)
        if id(verdict) not in in_table
    ]
    if result.get("tuned") is False:
        facts.append("the learning rates used were tuned for another version of this config")
    if compared_in(result):
        return [*facts, comparison_summary(result)]
    facts += where_traces_pay(result.get("map", []))
    facts += accuracies_by_steps(result)
    facts += traces_kept(result)
    if result.get("overlap") is not None:
        facts.append(
            f"{100 * result['overlap']:.1f} % of the 13-grams of held-out words also occur in the "
            "training text"
        )
    laws = result.get("laws", {})
    facts += [law_line(result, name, study) for name, study in laws.items()]
    main = next(iter(result["students"]))
    studied = {name for study in laws.values() for name in study["x"]} - {main}
    saved = result.get("savings")
    if saved:
        studied |= {name for curve in saved["curves"].values() for name in curve}
        facts.append(rows_line(saved))
    return facts + gaps_and_costs(result, studied)


def comparison_summary(result: dict[str, Any]) -> str:
    """How many comparisons the table makes, and their results."""
    if not result["verdicts"]:
        return "no comparisons on this split"
    results = [verdict["here"] or verdict["result"] for verdict in result["verdicts"]]
    counts = [f"{results.count(kind)} {kind}" for kind in dict.fromkeys(results)]
    seeds = min(verdict["seeds"] for verdict in result["verdicts"])
    over = f"over {seeds} seeds" if seeds > 1 else "in one run, over rows alone"
    return (
        f"{len(results)} comparisons {over}: {', '.join(counts)} (in the table ?: not "
        "distinguished at 5 % after Dunnett's correction for all methods compared with one model)"
    )


def gaps_and_costs(result: dict[str, Any], left_out: set[str]) -> list[str]:
    """Gaps closed and cost; students with equal lines share one."""
    measured = metrics_in(result)[task_of(result).headline].heading
    students: dict[str, list[str]] = {}  # by line
    for name, shares in result["gaps"].items():
        if name in left_out:
            continue
        for gap, share in shares.items():
            control = gap.removesuffix("_to_teacher")
            line = f"{{}}: no significant gap from {control} to teacher in {measured} to close"
            if share["share"] is not None:
                numbers = (share["share"], *share["ci95"])
                middle, low, high = (fixed(100 * number, 0) for number in numbers)
                part = f"{middle} % [{low}, {high}]"
                here = "" if len(result["seeds"]) > 1 else "in this run, "
                line = (
                    f"{here}{{}} closes {part} of the gap from {control} to teacher in {measured}"
                )
            students.setdefault(line, []).append(name)
    for name in result["students"]:
        share = result["cost"]["fraction_of_teacher_by_student"][name]["flops"]
        if share is not None and name not in left_out:
            line = f"set to {100 * share:.1f} % of the teacher's training FLOPs: outputs and {{}}"
            students.setdefault(line, []).append(name)
    lines = [line.format(list_of(names)) for line, names in students.items()]
    return lines + measured_costs(result, left_out)


def measured_costs(result: dict[str, Any], left_out: set[str]) -> list[str]:
    """What was measured beside the FLOPs that the budget set, and the total with the teacher."""
    cost = result["cost"]
    if "published" in cost:
        return [published_cost(cost)]
    shares = {n: f for n, f in cost["fraction_of_teacher_by_student"].items() if n not in left_out}
    parts = [
        f"{name} {' / '.join(f'{100 * share[key]:.0f}' for key in ('seconds', 'joules', 'money'))}"
        for name, share in shares.items()
        if share["flops"] is not None
    ]
    if not parts:
        return []
    measured = (
        "measured for outputs and one student, in % of the teacher's seconds / joules / money: "
        f"{', '.join(parts)} (joules: {cost['joules_source']})"
    )
    if not had_the_machine(result):
        measured = (
            "seconds, joules and money are left out: other programs did "
            f"{100 * cost['load_of_others']:.0f} % of the machine's work meanwhile"
        )
    main = next(iter(result["students"]))
    totals = cost["flops_per_student_with_teacher"]
    with_teacher = ", ".join(
        f"{100 * share:.0f} % {'for' if count == '1' else 'each for'} {count}"
        for count, share in totals.items()
    )
    return [
        measured,
        "if the teacher's training and its outputs are paid once and shared, in FLOPs of that "
        f"training per student ({main}): {with_teacher}",
    ]


def published_cost(cost: dict[str, Any]) -> str:
    """What others state of the teacher's training, never mixed with what was measured."""
    published = cost["published"]
    measured = [row["flops"] for row in cost["stages"] if row["stage"].startswith("students/")]
    return (
        f"the teacher's training is published as {published['flops']:.2g} FLOPs "
        f"({published['source']}), and was not measured here; the most expensive student took "
        f"{max(measured):.2g}, its teacher's outputs apart"
    )


def list_of(names: list[str]) -> str:
    """One name, or how many and which."""
    return names[0] if len(names) == 1 else f"each of {len(names)} students ({', '.join(names)})"


def traces_kept(result: dict[str, Any]) -> list[str]:
    """A line for every student that learned only from traces with a right answer."""
    made = result["cost"]["outputs_by_student"]
    return [
        f"{name} learned from {made[name]['kept']:,} of {made[name]['rows']:,} traces, those with "
        "a right answer"
        for name, entry in result["students"].items()
        if entry["recipe"]["outputs"]["traces"] == "right" and made.get(name, {}).get("kept")
    ]


def where_traces_pay(cells: list[dict[str, Any]]) -> list[str]:
    """A line for every pair of students in the map: at which numbers of steps traces pay."""
    lines = []
    for claim in dict.fromkeys(cell["claim"] for cell in cells):
        parts = []
        found = {c["steps"]: c["here"] or c["result"] for c in cells if c["claim"] == claim}
        for result in dict.fromkeys(found.values()):
            steps = ", ".join(str(n) for n, one in found.items() if one == result)
            parts.append(f"{result} at {steps}")
        first, _, second = claim.split()
        lines.append(
            f"{first} against {second} by number of steps (exploratory, {len(cells)} cells): "
            f"{'; '.join(parts)}"
        )
    return lines


def accuracies_by_steps(result: dict[str, Any]) -> list[str]:
    """For a task whose problems have steps, a line per model: right answers in %, with a bar
    between the splits."""
    task = task_of(result)
    if not task.steps:
        return []
    lines = []
    for name, entry in models_in(result).items():
        parts = []
        for split, values in by_split(entry, result).items():
            steps = task.steps.get(split) or task.steps[task.evaluation_splits[0]]
            quality = values.get("quality", {})
            found = [quality[key] for n in steps if (key := task.accuracy_at(n)) in quality]
            parts.append("  ".join(f"{100 * value['mean']:.0f}" for value in found))
        shown = " | ".join(filter(None, parts))
        lines.append(f"{name}: right answers % at 1, 2, ... steps: {shown}")
    return lines


def law_line(result: dict[str, Any], name: str, study: dict[str, Any]) -> str:
    """How the divergence depends on the number of rows, or on the size of the student."""
    best = min(
        study["x"],
        key=lambda one: result["students"][one]["fidelity"][DIVERGENCE]["mean"],
    )
    rows = f"the number of different {task_of(result).item_noun}"
    x = rows if name == "rows" else "the student's share of the teacher's parameters"
    if not study["law"]:
        return f"KL to teacher over {x}: too few students for a law; {best} is closest"
    parts = [f"KL to teacher = {Law(*study['law'])} nats, x {x}"]
    bounds = study.get("law_ci95", [])
    spans = [f"{low:.3g} to {high:.3g}" for low, high in bounds[: 4 if study["law"][3] else 3]]
    if spans:
        parts.append(f"95 % intervals in this order {', '.join(spans)}")
    worst = max(map(abs, study["residuals"].values()))
    parts.append(f"residuals at most {100 * worst:.0f} %")
    if name == "size":
        parts.append(minimum_in_words(study))
    return "; ".join([*parts, f"of those tried, {best} is closest to the teacher"])


def minimum_in_words(study: dict[str, Any]) -> str:
    if study["identified"]:
        low, high = study.get("minimum_ci95", (study["minimum_at"], study["minimum_at"]))
        return f"minimum at {study['minimum_at']:.2g} [{low:.2g}, {high:.2g}]"
    found = [value for value in study["minimum_without"].values() if value]
    missing = len(study["minimum_without"]) - len(found)
    without = (
        f"without one of the students it lies between {min(found):.2g} and {max(found):.2g}"
        if found
        else "without any one of the students there is none"
    )
    none = f", or not within the sizes tried ({missing} times)" if found and missing else ""
    return f"the place of a minimum is not identified: {without}{none}"


def rows_line(saved: dict[str, Any]) -> str:
    """What each curve read of the data and of the teacher, at its budgets."""
    parts = []
    for curve, students in saved["curves"].items():
        labels, answers = ([saved[key][name] for name in students] for key in ("labels", "answers"))
        kind, counts = ("answers of the teacher", answers) if any(answers) else ("labels", labels)
        shown = [f"{count:,}" for count in dict.fromkeys([min(counts), max(counts)])]
        parts.append(f"{curve} {' to '.join(shown)} {kind}")
    return f"different rows that students read: {'; '.join(parts)}"
