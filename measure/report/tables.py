"""Results as tables: the same in the console, the documents and the report."""

from typing import Any

from measure.metrics import AGREEMENT, DIVERGENCE, metrics_in
from measure.verdicts import NOT_DISTINGUISHED, claim_of
from tasks import TASKS
from tasks.task import Metric, Task

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


def parameters(entry: dict[str, Any]) -> str:
    """How many a model has; those of a teacher behind an endpoint are unknown."""
    return "unknown" if entry["params"] is None else f"{entry['params']:,}"


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
    """Headings of a comparison of methods: bytes per token of the outputs, verdicts."""
    compared = compared_in(result)
    return ["bytes per token", *compared] if compared else []


def more_cells(result: dict[str, Any], name: str) -> list[str]:
    """The cells under `more_headings`: differences in the unit of the metric."""
    compared, cost, metrics = compared_in(result), result["cost"], metrics_in(result)
    if not compared:
        return []
    weight = cost["outputs_by_student"].get(name, {}).get("bytes_per_token")
    cells = [f"{weight:.1f}" if weight else "-"]
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


# -- tables ----------------------------------------------------------------------------------------

ShownTable = tuple[str, list[str], list[list[str]]]  # title, headings, rows
Pair = tuple[str, str, bool]  # claim, split, exploratory


def more_tables(result: dict[str, Any]) -> list[ShownTable]:
    """The tables beside that of the models."""
    return [
        *claims_table(result),
        *savings_tables(result),
        *bought_tables(result),
        *defence_tables(result),
    ]


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
        f"Claims over {over}: by how much the first model is better, with 95 % intervals; where it "
        "says neither better nor worse, the two are not distinguished"
    )
    if any("committed" in verdict for verdict in found):
        title += (
            "; then the mean of the committed runs ± the standard deviation between them, and in "
            "how many of them the first was ahead, significantly or not"
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
    committed = committed_runs(verdict, metric)
    return f"{cell}; {committed}, ahead in {verdict['committed']['ahead']}" if committed else cell


def committed_runs(verdict: dict[str, Any], metric: Metric) -> str:
    """`10 runs: +3.7 ± 0.7`: the differences in the committed runs, if there are any."""
    committed = verdict.get("committed")
    if not committed:
        return ""
    mean, spread = (metric.scale * committed[key] for key in ("mean", "spread"))
    digits = metric.digits
    return f"{committed['runs']} runs: {mean:+.{digits}f} ± {spread:.{digits}f}"


def savings_tables(result: dict[str, Any]) -> list[ShownTable]:
    """For each metric: what each curve costs at the quality of each student of the reference, as a
    ratio to that student's FLOPs and seconds."""
    saved = result.get("savings")
    if not saved:
        return []
    if had_the_machine(result):
        return needs_tables(result, saved, "Cost", {"flops": "FLOPs", "seconds": "seconds"})
    return needs_tables(result, saved, "Cost", {"flops": "FLOPs"})


def bought_tables(result: dict[str, Any]) -> list[ShownTable]:
    """What each student paid for its outputs; and, for each metric, what each kind of access needs
    for the quality of each student of the first."""
    found = result.get("bought")
    if not found:
        return []
    currency, columns = result["config"]["cost"]["currency"], columns_of(result, short=True)
    rows = [
        [name, f"{paid['tokens']:,}", f"{paid['money']:.4f}",
         *cells_of(result["students"][name], columns, interval=False)]
        for name, paid in found["paid"].items()
    ]  # fmt: skip
    headings = ["", "tokens bought", currency, *map(heading, columns.values())]
    paid = ("What the outputs cost, as billed", headings, rows)
    units = {"tokens": "tokens", "money": "money"}
    return [paid, *needs_tables(result, found, "Tokens bought", units)]


def defence_tables(result: dict[str, Any]) -> list[ShownTable]:
    """What defences cost customers; and what an extractor gets with each."""
    found = result.get("defence")
    if not found:
        return []
    metric, kl = metrics_in(result)[task_of(result).headline], metrics_in(result)[DIVERGENCE]
    settings = [
        [
            defence_name(one),
            fixed(metric.scale * one[task_of(result).headline], metric.digits),
            fixed(one[DIVERGENCE], kl.digits),
        ]
        for one in found["settings"]
    ]
    prices = "What customers get: the teacher's answers with each defence, on held-out rows"
    cells = [
        [
            f"{one['exposure']}, {one['prompts']:,}",
            defence_name(one),
            one["student"],
            fixed(one["divergence"], kl.digits),
            "-" if one["damage"] is None else f"{one['damage']:+.{kl.digits}f}",
            " ".join(f"{z:.1f}" for z in one["z"]) or "-",
        ]
        for one in sorted(found["cells"], key=lambda one: (one["exposure"], one["prompts"]))
    ]
    headings = ["", "defence", "best student", heading(kl), "damage, nats", "z of the mark"]
    extractor = "What an extractor gets: the best student by what it is shown, and how many prompts"
    shifted = "KL from the undefended teacher, nats"
    tables = [
        (prices, ["defence", heading(metric), shifted], settings),
        (extractor, headings, cells),
    ]
    if found.get("stealing"):
        size = found["stealing"]["size"]
        stolen = [
            [how, str(one["size"] or "none")] for how, one in found["stealing"]["shown"].items()
        ]
        title = f"The hidden size of the teacher, {size}, from the log-probabilities that are shown"
        tables.append((title, ["shown", "size found"], stolen))
    return tables


def defence_name(one: dict[str, Any]) -> str:
    """`watermark 2`, `temperature 0.3`, `none`."""
    share = f" in {one['share']:.0%}" if one.get("share", 1.0) < 1 else ""
    parts = [f"watermark {one['bias']:g}{share}"] if one["bias"] else []
    parts += [f"temperature {one['temperature']:g}"] if one["temperature"] != 1 else []
    parts += (
        [f"antidistillation {one['antidistillation']:g} of {one['proxy']}"]
        if one.get("antidistillation")
        else []
    )
    return ", ".join(parts) or "none"


def needs_tables(
    result: dict[str, Any], saved: dict[str, Any], what: str, units: dict[str, str]
) -> list[ShownTable]:
    """A table per metric. units: {cost: its name}; the second is shown in brackets."""
    found, metrics, reference = [], metrics_in(result), saved["reference"]
    unit = " (".join(units.values()) + ")" * (len(units) - 1)
    for name, targets in saved["needs"].items():
        metric = metrics[name]
        title = f"{what} at the same {metric.heading}, as a ratio to {reference}'s"
        kinds = [curve for curve in saved["curves"] if curve != reference]
        headings = ["", heading(metric), *(f"{kind}: {unit}" for kind in kinds)]
        rows = []
        for student, needs in targets.items():
            value = value_in(result["students"][student], name)["mean"]
            cells = [needs_cell(needs[kind], [*units]) for kind in kinds]
            rows.append([student, fixed(metric.scale * value, metric.digits), *cells])
        found.append((title, headings, rows))
    return found


def needs_cell(need: dict[str, Any] | str, keys: list[str]) -> str:
    """`0.45 [0.41, 0.50] (0.62)`, or what is not known within the budgets that were tried."""
    if isinstance(need, str):
        known = {"less": "below the least tried", "more": "above the most tried"}
        return known.get(need, need)
    first, *others = (need[key] for key in keys)
    low, high = first["ci95"]
    cell = f"{first['ratio']:.2f} [{low:.2f}, {high:.2f}]"
    return " ".join([cell, *(f"({other['ratio']:.2f})" for other in others)])


def models_table(result: dict[str, Any], interval: bool) -> ShownTable:
    """A row per model: size, cost in % of the teacher's training FLOPs, outputs included, and the
    metrics of the short table."""
    compared, entries = compared_in(result), models_in(result).values()
    columns = {
        name: metric
        for name, metric in columns_of(result, short=True).items()
        if any(value_in(entry, name) for entry in entries)
    }
    headings = ["", "parameters", "cost %", *map(heading, columns.values()), *more_headings(result)]
    rows = []
    for name, entry in models_in(result).items():
        size = [parameters(entry), cost_cell(result, name)]
        cells = cells_of(entry, columns, interval=interval and not compared)
        rows.append([name, *size, *cells, *more_cells(result, name)])
    return f"{result['config']['name']}, {result['split']} split", headings, rows


def cost_cell(result: dict[str, Any], name: str) -> str:
    """In % of the teacher's training FLOPs; nothing for a pretrained teacher, whose are unknown."""
    share = result["cost"]["fraction_of_teacher_by_student"].get(name)
    if share and share["flops"]:
        return f"{100 * share['flops']:.1f}"
    return "100" if name == "teacher" and result["teacher"]["cost"]["flops"] else "-"


def had_the_machine(result: dict[str, Any]) -> bool:
    """Whether a run had the machine to itself, so that its seconds can be compared."""
    return (result["cost"].get("load_of_others") or 0.0) <= 0.05
