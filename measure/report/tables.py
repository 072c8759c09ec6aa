"""Results as tables and sentences: the same in the console, the documents and the report."""

import json
import re
from pathlib import Path
from typing import Any

from measure.laws import Law
from measure.metrics import AGREEMENT, DIVERGENCE, metrics_in
from measure.verdicts import NOT_DISTINGUISHED, claim_of, verdict_line
from tasks import TASKS
from tasks.task import Metric, Task

BLOCK = re.compile(r"(<!-- results/(\S+)\.json -->\n).*?(<!-- end -->)", re.DOTALL)

Columns = dict[str, Metric]


def models_in(result: dict[str, Any]) -> dict[str, Any]:
    """The entries of teacher, students and controls, by name."""
    return {"teacher": result["teacher"], **result["students"], **result["controls"]}


def task_of(result: dict[str, Any]) -> type[Task]:
    return TASKS[result["config"]["task"]["name"]]


def columns_of(result: dict[str, Any], short: bool = False) -> Columns:
    """The metrics of the result's task, then those of all tasks; only a few in the short table."""
    metrics, task = metrics_in(result), task_of(result)
    return {name: metrics[name] for name in task.table} if short and task.table else metrics


def fidelity_shown(result: dict[str, Any]) -> str:
    """The metric that stands for fidelity in figures: the first of the short table that compares a
    model with its teacher."""
    metrics = metrics_in(result)
    return next((n for n in task_of(result).table if metrics[n].needs_teacher), AGREEMENT)


def heading(metric: Metric) -> str:
    return f"{metric.heading} %" if metric.is_share else f"{metric.heading}, {metric.unit}"


def value_in(entry: dict[str, Any], name: str) -> dict[str, Any] | None:
    """{"mean", "ci95", "per_seed"} of a metric; None where it was not measured."""
    return entry.get("quality", {}).get(name) or entry.get("fidelity", {}).get(name)


def cells_of(entry: dict[str, Any], columns: Columns, interval: bool) -> list[str]:
    """One cell per column: the mean and, with `interval`, its 95 % interval."""
    cells = []
    for name, metric in columns.items():
        value = value_in(entry, name)
        if value is None:
            cells.append("-")
            continue
        low, high = (fixed(metric.scale * bound, metric.digits) for bound in value["ci95"])
        mean = fixed(metric.scale * value["mean"], metric.digits)
        cells.append(f"{mean} [{low}, {high}]" if interval else mean)
    return cells


def fixed(value: float, digits: int) -> str:
    """A number with this many digits, never -0."""
    return f"{round(value, digits) + 0.0:.{digits}f}"


def per_seed_values(result: dict[str, Any]) -> dict[str, list[float]]:
    """{"states sequence_agreement": one value per seed} of all models, splits and metrics; and
    {"states beats baseline: sequence_agreement": one difference per seed} of all claims."""
    found = {}
    for name, entry in models_in(result).items():
        for split, values in by_split(entry, result).items():
            for group in ("quality", "fidelity"):
                for metric, value in values.get(group, {}).items():
                    key = f"{name} {metric}" + ("" if values is entry else f" ({split})")
                    found[key] = value["per_seed"]
    return found | {claim_of(v): v["per_seed"] for v in result["verdicts"] if "per_seed" in v}


def by_split(entry: dict[str, Any], result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A model's entry for each split; that of the main split is the entry itself."""
    others = {split: entry[split] for split in task_of(result).evaluation_splits if split in entry}
    return {result["split"]: entry, **others}


# -- comparisons of many methods -------------------------------------------------------------------


def compared_in(result: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """{heading: (other model, metric)} of the columns that `compare` of the config adds."""
    compare = result["config"].get("compare")
    if not compare:
        return {}
    metrics = metrics_in(result)
    return {
        f"{metrics[name].heading} against {other}": (other, name)
        for name in compare["metrics"]
        for other in compare["against"]
    }


def more_headings(result: dict[str, Any]) -> list[str]:
    """Headings of a comparison of methods: total cost, bytes per token of the outputs, verdicts."""
    compared = compared_in(result)
    return ["cost %", "bytes per token", *compared] if compared else []


def more_cells(result: dict[str, Any], name: str) -> list[str]:
    """The cells under `more_headings`: differences in the unit of the metric."""
    compared, cost, metrics = compared_in(result), result["cost"], metrics_in(result)
    if not compared:
        return []
    share = cost["fraction_of_teacher_by_student"].get(name)
    weight = cost["outputs_by_student"].get(name, {}).get("bytes_per_token")
    cells = [
        f"{100 * share['flops']:.1f}" if share and share["flops"] else "-",
        f"{weight:.1f}" if weight else "-",
    ]
    verdicts = {(v["claim"], v["metric"]): v for v in result["verdicts"]}
    for other, metric in compared.values():
        verdict = verdicts.get((f"{name} beats {other}", metric))
        if verdict is None:
            cells.append("-")
            continue
        scale, digits = metrics[metric].scale, metrics[metric].digits
        cells.append(f"{scale * verdict['difference']:+.{digits}f} {in_a_cell(verdict)}")
    return cells


def in_a_cell(verdict: dict[str, Any]) -> str:
    """The result; `here` marks that of one run, and `?` what is not distinguished."""
    result, here = verdict["here"] or verdict["result"], " here" if verdict["here"] else ""
    return "?" if result == NOT_DISTINGUISHED else result + here


def comparison_summary(result: dict[str, Any]) -> str:
    """How many comparisons the table makes, and their results."""
    if not result["verdicts"]:
        return "no comparisons on this split"
    results = [verdict["result"] for verdict in result["verdicts"]]
    counts = [f"{results.count(kind)} {kind}" for kind in dict.fromkeys(results)]
    seeds = min(verdict["seeds"] for verdict in result["verdicts"])
    over = f"over {seeds} seeds" if seeds > 1 else "in one run, over rows alone"
    return (
        f"{len(results)} comparisons {over}: {', '.join(counts)} (in the table ?: not "
        "distinguished at 5 % after Dunnett's correction for all methods compared with one model)"
    )


# -- sentences -------------------------------------------------------------------------------------


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
        facts.append("the learning rates in force were tuned for another version of this config")
    if compared_in(result):
        return [*facts, comparison_summary(result)]
    facts += where_traces_pay(result.get("map", []))
    facts += accuracies_by_steps(result)
    facts += traces_kept(result)
    laws = result.get("laws", {})
    facts += [law_line(result, name, study) for name, study in laws.items()]
    main = next(iter(result["students"]))
    studied = {name for study in laws.values() for name in study["x"]} - {main}
    saved = result.get("savings")
    if saved:
        studied |= {name for curve in saved["curves"].values() for name in curve}
        facts.append(rows_line(saved))
    return facts + gaps_and_costs(result, studied)


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
                low, high = (100 * bound for bound in share["ci95"])
                part = f"{100 * share['share']:.0f} % [{low:.0f}, {high:.0f}]"
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
        f"with the teacher's training charged, in FLOPs of it per student ({main}): {with_teacher}",
    ]


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


# -- tables ----------------------------------------------------------------------------------------

ShownTable = tuple[str, list[str], list[list[str]]]  # title, headings, rows
Pair = tuple[str, str, bool]  # claim, split, exploratory


def more_tables(result: dict[str, Any]) -> list[ShownTable]:
    """The tables beside that of the models."""
    return [*claims_table(result), *savings_tables(result)]


def claims_by_pair(result: dict[str, Any]) -> dict[Pair, dict[str, Any]]:
    """{pair: {metric: verdict}} of two models that are compared in several metrics."""
    pairs: dict[Pair, dict[str, Any]] = {}
    for verdict in [] if compared_in(result) else result["verdicts"]:
        if " beats " in verdict["claim"] and verdict["threshold"] == 0:
            pair = verdict["claim"], verdict["split"], verdict["exploratory"]
            pairs.setdefault(pair, {})[verdict["metric"]] = verdict
    return {pair: claims for pair, claims in pairs.items() if len(claims) > 1}


def claims_table(result: dict[str, Any]) -> list[ShownTable]:
    """A row per pair of models, a column per metric: by how much the first is better."""
    pairs, metrics = claims_by_pair(result), metrics_in(result)
    if not pairs:
        return []
    found = [verdict for claims in pairs.values() for verdict in claims.values()]
    columns = dict.fromkeys(verdict["metric"] for verdict in found)
    counts = sorted({verdict["seeds"] for verdict in found})
    span = dict.fromkeys([counts[0], counts[-1]])
    over = f"{' to '.join(map(str, span))} seeds" if counts[-1] > 1 else "one run"
    rows = []
    for (claim, split, exploratory), claims in pairs.items():
        first, _, second = claim.split()
        label = f"{first} against {second}"
        label += f", {split}" if split != result["split"] else ""
        label += " (exploratory)" if exploratory else ""
        cells = [claim_cell(claims.get(name), metrics[name]) for name in columns]
        rows.append([label, *cells])
    title = (
        f"Claims over {over}: by how much the first model is better, with 95 % intervals; without "
        "a word, the two are not distinguished"
    )
    units = [f"{metrics[name].heading}, {metrics[name].difference_unit}" for name in columns]
    return [(title, ["", *units], rows)]


def claim_cell(verdict: dict[str, Any] | None, metric: Metric) -> str:
    """`+4.5 [3.6, 5.5] better`; for one run, also how the committed ones came out."""
    if verdict is None:
        return "-"
    numbers = (verdict["difference"], *verdict["ci95"])
    difference, low, high = (fixed(metric.scale * number, metric.digits) for number in numbers)
    sign = "" if difference.startswith("-") else "+"
    word = in_a_cell(verdict).replace("?", "")
    cell = f"{sign}{difference} [{low}, {high}] {word}".strip()
    committed = verdict.get("committed")
    if not committed:
        return cell
    mean, spread = (metric.scale * committed[key] for key in ("mean", "spread"))
    digits = metric.digits
    return (
        f"{cell}; {committed['runs']} runs: {mean:+.{digits}f} ± {spread:.{digits}f}, ahead in "
        f"{committed['ahead']}"
    )


def savings_tables(result: dict[str, Any]) -> list[ShownTable]:
    """For each metric: what each curve costs at the quality of each student of the reference, as a
    ratio to that student's FLOPs and seconds."""
    saved, metrics = result.get("savings"), metrics_in(result)
    if not saved:
        return []
    found = []
    for name, targets in saved["needs"].items():
        metric, reference = metrics[name], saved["reference"]
        title = f"Cost at the same {metric.heading}, as a ratio to {reference}'s"
        kinds = [curve for curve in saved["curves"] if curve != reference]
        seconds = had_the_machine(result)
        unit = "FLOPs (seconds)" if seconds else "FLOPs"
        headings = ["", heading(metric), *(f"{kind}: {unit}" for kind in kinds)]
        rows = []
        for student, needs in targets.items():
            value = value_in(result["students"][student], name)["mean"]
            cells = [savings_cell(needs[kind], seconds) for kind in kinds]
            rows.append([student, fixed(metric.scale * value, metric.digits), *cells])
        found.append((title, headings, rows))
    return found


def savings_cell(need: dict[str, Any] | str, seconds: bool) -> str:
    """`0.45 [0.41, 0.50] (0.62)`, or what is not known within the budgets that were tried."""
    if isinstance(need, str):
        known = {"less": "below the least tried", "more": "above the most tried"}
        return known.get(need, need)
    low, high = need["flops"]["ci95"]
    flops = f"{need['flops']['ratio']:.2f} [{low:.2f}, {high:.2f}]"
    return f"{flops} ({need['seconds']['ratio']:.2f})" if seconds else flops


def models_table(result: dict[str, Any], interval: bool) -> ShownTable:
    """A row per model: size, cost, and the metrics of the short table."""
    compared, columns = compared_in(result), columns_of(result, short=True)
    headings = ["", "parameters", "TFLOPs", *map(heading, columns.values()), *more_headings(result)]
    rows = []
    for name, entry in models_in(result).items():
        size = [f"{entry['params']:,}", f"{entry['cost']['flops'] / 1e12:.2f}"]
        cells = cells_of(entry, columns, interval=interval and not compared)
        rows.append([name, *size, *cells, *more_cells(result, name)])
    return f"{result['config']['name']}, {result['split']} split", headings, rows


def with_tables(page: str, results: Path) -> str:
    """The text with every block `<!-- results/NAME.json --> ... <!-- end -->` rewritten from
    results/NAME.json. `eval.py RUN --update` writes it, and a test compares it."""

    def block(match: re.Match) -> str:
        file = results / f"{match[2]}.json"
        result = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
        if result is None or not is_current(result):
            return match[0]
        return match[1] + markdown(result) + match[3]

    return BLOCK.sub(block, page)


def had_the_machine(result: dict[str, Any]) -> bool:
    """Whether a run had the machine to itself, so that its seconds can be compared."""
    return (result["cost"].get("load_of_others") or 0.0) <= 0.05


def shared_with_others(result: dict[str, Any]) -> str:
    """Nothing, for a run that had the machine to itself."""
    if had_the_machine(result):
        return ""
    load = 100 * result["cost"]["load_of_others"]
    return f", shared with other programs ({load:.0f} % of its work)"


def times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def is_current(result: dict[str, Any]) -> bool:
    """Whether this version decided the verdicts and fitted the laws."""
    decided = all("p_corrected" in verdict for verdict in result["verdicts"])
    fitted = all("residuals" in study for study in result.get("laws", {}).values())
    return decided and fitted and "heldout_reads" in result


def markdown(result: dict[str, Any]) -> str:
    """One result as a Markdown table and a list of facts."""
    lines = []
    tables = [models_table(result, interval=False), *more_tables(result)]
    for number, (title, headings, rows) in enumerate(tables):
        lines += ["", f"{title}:", ""] if number else []
        lines += [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
    facts = [*facts_of(result), work_line(result)]
    return "\n".join([*lines, "", *(f"- {fact}" for fact in facts), ""])


def work_line(result: dict[str, Any]) -> str:
    """How long the run took, on which machine, and what it read of the held-out split."""
    stages = result["cost"]["stages"]
    tuning = sum(stage["seconds"] for stage in stages if stage["stage"] == "tuning") / 60
    work = sum(stage["seconds"] for stage in stages) / 60 - tuning
    tuned = f", after {tuning:.0f} minutes of tuning" if tuning else ""
    memory = max(stage["peak_memory_mb"] for stage in stages)
    where = result["environment"]["trained"]
    return (
        f"{work:.0f} minutes of work{tuned}, shared by {result['config']['workers']} "
        f"processes of at most {memory} MB, on {where['cores']} cores of {where['cpu']}"
        f"{shared_with_others(result)}; this run read the held-out split "
        f"{times(result['heldout_reads'])}"
    )
