"""How results are written down: the same columns in the console, the README and the report."""

import json
import re
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from measure.laws import Law
from measure.statistics import in_words, verdict_line

# {heading: (group, metric, scale, digits)}; those in SHORT stand everywhere, the report has all
OF_TASK = {
    "pronounce": {
        "word errors %": ("quality", "word_error_rate", 100, 1),
        "phoneme errors %": ("quality", "phoneme_error_rate", 100, 1),
    },
    "reason": {
        "right answers %": ("quality", "accuracy", 100, 1),
        "at 4 and 5 steps %": ("quality", "accuracy_4_5", 100, 1),
        "right steps %": ("quality", "right_steps", 100, 1),
        "sound steps %": ("quality", "sound_steps", 100, 1),
        "answer follows %": ("quality", "answer_follows", 100, 1),
        "faithful traces %": ("quality", "faithfulness", 100, 1),
        "same number as teacher %": ("fidelity", "answer_agreement", 100, 1),
        "teacher's steps %": ("fidelity", "step_agreement", 100, 1),
    },
    "gsm8k": {
        "right answers %": ("quality", "accuracy", 100, 1),
        "same number as teacher %": ("fidelity", "answer_agreement", 100, 1),
    },
}
OF_ALL = {
    "same answer as teacher %": ("fidelity", "sequence_agreement", 100, 1),
    "its errors copied %": ("fidelity", "agreement_on_teacher_errors", 100, 1),
    "KL to teacher, nats": ("fidelity", "kl_teacher_student", 1, 3),
    "KL from teacher, nats": ("fidelity", "kl_student_teacher", 1, 3),
    "top-1 agreement %": ("fidelity", "top1_agreement", 100, 1),
    "NLL gap, nats": ("fidelity", "nll_gap", 1, 3),
    "ECE %": ("fidelity", "ece", 100, 1),
}
SHORT = {
    "pronounce": (
        "word errors %",
        "phoneme errors %",
        "same answer as teacher %",
        "its errors copied %",
        "KL to teacher, nats",
    ),
    "reason": (
        "right answers %",
        "at 4 and 5 steps %",
        "faithful traces %",
        "same number as teacher %",
        "teacher's steps %",
    ),
    "gsm8k": ("right answers %", "same number as teacher %", "KL to teacher, nats"),
}
OPINION = {"beats": "beats", "does not beat": "no", "inconclusive": "?"}  # in a cell of a table
GAPS_IN = {"pronounce": "word errors", "reason": "right answers", "gsm8k": "right answers"}
BLOCK = re.compile(r"(<!-- results/(\S+)\.json -->\n).*?(<!-- end -->)", re.DOTALL)


def arms_in(result: dict[str, Any]) -> dict[str, Any]:
    """Teacher, students and controls, by name."""
    return {"teacher": result["teacher"], **result["students"], **result["controls"]}


Columns = dict[str, tuple[str, str, int, int]]


def columns_of(result: dict[str, Any], short: bool = False) -> Columns:
    """Those of the result's task, then those of all tasks."""
    task = result["config"]["task"]["name"]
    columns = OF_TASK[task] | OF_ALL
    return {heading: columns[heading] for heading in SHORT[task]} if short else columns


def cells_of(entry: dict[str, Any], columns: Columns, interval: bool) -> list[str]:
    """One cell per column: the mean and, if asked for, its 95 % interval."""
    cells = []
    for group, key, scale, digits in columns.values():
        metric = entry.get(group, {}).get(key)
        if metric is None:
            cells.append("-")
            continue
        low, high = (fixed(scale * bound, digits) for bound in metric["ci95"])
        mean = fixed(scale * metric["mean"], digits)
        cells.append(f"{mean} [{low}, {high}]" if interval else mean)
    return cells


def fixed(value: float, digits: int) -> str:
    """So many digits, and no minus before a zero."""
    return f"{round(value, digits) + 0.0:.{digits}f}"


def compared_in(result: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """{heading: (other arm, metric)} of the columns that `compare` of the config adds."""
    compare = result["config"].get("compare")
    if not compare:
        return {}
    return {
        f"{in_words(metric)} against {other}": (other, metric)
        for metric in compare["metrics"]
        for other in compare["against"]
    }


def more_headings(result: dict[str, Any]) -> list[str]:
    """Of a comparison of methods: cost in all, what a token of the outputs weighs, verdicts."""
    compared = compared_in(result)
    return ["cost %", "bytes per token", *compared] if compared else []


def more_cells(result: dict[str, Any], arm: str) -> list[str]:
    """The cells under `more_headings`: differences in points (nats for divergences)."""
    compared, cost = compared_in(result), result["cost"]
    if not compared:
        return []
    share = cost["fraction_of_teacher_by_student"].get(arm)
    weight = cost["outputs_by_student"].get(arm, {}).get("bytes_per_token")
    cells = [
        f"{100 * share['flops']:.1f}" if share and share["flops"] else "-",
        f"{weight:.1f}" if weight else "-",
    ]
    found = {(v["claim"], v["metric"]): v for v in result["verdicts"]}
    for other, metric in compared.values():
        verdict = found.get((f"{arm} beats {other}", metric))
        if verdict is None:
            cells.append("-")
            continue
        nats = metric.startswith(("kl_", "nll"))
        scale, digits = (1, 3) if nats else (100, 1)
        cells.append(f"{scale * verdict['difference']:+.{digits}f} {OPINION[verdict['result']]}")
    return cells


def facts_of(result: dict[str, Any]) -> list[str]:
    """Verdicts but for those in the table, gaps closed and cost, a line each."""
    own = [(v["claim"], v["metric"]) for v in result["config"].get("verdicts", [])]
    facts = [
        verdict_line(verdict)
        for verdict in result["verdicts"]
        if (verdict["claim"], verdict["metric"]) in own or not compared_in(result)
    ]
    if compared_in(result):
        return [*facts, corrected(result)]
    facts += where_traces_pay(result.get("map", []))
    facts += accuracies_by_steps(result)
    facts += traces_kept(result)
    laws = result.get("laws", {})
    facts += [law_line(result, name, study) for name, study in laws.items()]
    main = next(iter(result["students"]))
    studied = {arm for study in laws.values() for arm in study["x"]} - {main}  # the law says it all
    measured = GAPS_IN[result["config"]["task"]["name"]]
    told_of: dict[
        str, list[str]
    ] = {}  # gaps and costs: the same is said once, of all it is true of
    for arm, shares in result["gaps"].items():
        if arm in studied:
            continue
        for gap, share in shares.items():
            words = f"gap {gap.replace('_', ' ')} in {measured}"
            said = f"{{}}: there is no {words} to close"
            if share["share"] is not None:
                low, high = (100 * bound for bound in share["ci95"])
                part = f"{100 * share['share']:.0f} % [{low:.0f}, {high:.0f}]"
                said = f"{{}} closes {part} of the {words}"
            told_of.setdefault(said, []).append(arm)
    for arm in result["students"]:
        share = result["cost"]["fraction_of_teacher_by_student"][arm]["flops"]
        if share is not None and arm not in studied:
            said = f"outputs + {{}} = {100 * share:.1f} % of the teacher's training FLOPs"
            told_of.setdefault(said, []).append(arm)
    return facts + [said.format(all_of(arms)) for said, arms in told_of.items()]


def traces_kept(result: dict[str, Any]) -> list[str]:
    """A line for every student that was shown traces with a right answer alone."""
    made = result["cost"]["outputs_by_student"]
    return [
        f"{arm} learned from {made[arm]['kept']:,} of {made[arm]['rows']:,} traces: the others do "
        "not end with the right answer"
        for arm, entry in result["students"].items()
        if entry["recipe"].get("traces") == "right" and made.get(arm, {}).get("kept")
    ]


def all_of(arms: list[str]) -> str:
    """One arm, or how many and which."""
    return arms[0] if len(arms) == 1 else f"each of {len(arms)} students ({', '.join(arms)})"


def where_traces_pay(cells: list[dict[str, Any]]) -> list[str]:
    """A line for every pair of students in the map: at which numbers of steps traces pay."""
    lines = []
    for claim in dict.fromkeys(cell["claim"] for cell in cells):
        found = {"beats": "BEATS", "inconclusive": "INCONCLUSIVE", "does not beat": "DOES NOT BEAT"}
        parts = []
        for result, words in found.items():
            steps = [c["steps"] for c in cells if c["claim"] == claim and c["result"] == result]
            if steps:
                parts.append(f"{words} at {', '.join(map(str, steps))}")
        lines.append(f"{claim} by number of steps ({len(cells)} claims): {'; '.join(parts)}")
    return lines


def accuracies_by_steps(result: dict[str, Any]) -> list[str]:
    """Of a task that reasons, a line per arm: right answers in %, beyond the bar at more steps than
    in training."""
    if result["config"]["task"]["name"] != "reason":
        return []
    lines = []
    for arm, entry in arms_in(result).items():
        splits = entry, entry.get("long", {})
        told = [
            "  ".join(
                f"{100 * split['quality'][key]['mean']:.0f}"
                for key in (f"accuracy_{n}" for n in range(1, 9))
                if key in split.get("quality", {})
            )
            for split in splits
        ]
        lines.append(f"{arm}: right answers % at 1, 2, ... steps: {' | '.join(filter(None, told))}")
    return lines


def law_line(result: dict[str, Any], name: str, study: dict[str, Any]) -> str:
    """How the divergence depends on the number of words, or on the size of the student."""
    best = min(
        study["x"],
        key=lambda arm: result["students"][arm]["fidelity"]["kl_teacher_student"]["mean"],
    )
    things = "words" if result["config"]["task"]["name"] == "pronounce" else "problems"
    of = f"different {things}" if name == "words" else "the student's share of the parameters"
    law = f"KL to teacher = {Law(*study['law'])} nats, x {of}" if study["law"] else f"over {of}"
    turns = f"; least at {study['least_at']:.2g}" if study["least_at"] else ""
    return f"{law}{turns}; of those tried, {best} is nearest to the teacher"


def corrected(result: dict[str, Any]) -> str:
    """How many comparisons the table makes, and what came of them."""
    if not result["verdicts"]:
        return "no comparisons on this split"
    results = [verdict["result"] for verdict in result["verdicts"]]
    counts = [f"{results.count(kind)} {kind}" for kind in dict.fromkeys(results)]
    seeds = min(verdict["seeds"] for verdict in result["verdicts"])
    over = f"over {seeds} seeds" if seeds > 1 else "over 1 seed (the intervals are over rows alone)"
    return (
        f"{len(results)} comparisons {over}: {', '.join(counts)} (in the table: beats, no, ?; "
        "beats: also after Holm's correction for all of them; no: the 95 % interval is not above 0)"
    )


def console_table(result: dict[str, Any]) -> Table:
    table = Table(box=box.ASCII, title=f"{result['config']['name']}, {result['split']} split")
    table.add_column("")
    compared, columns = compared_in(result), columns_of(result, short=True)
    for heading in ("params", "TFLOPs", *columns, *more_headings(result)):
        table.add_column(heading, justify="right")
    for arm, entry in arms_in(result).items():
        size = [f"{entry['params']:,}", f"{entry['cost']['flops'] / 1e12:.2f}"]
        cells = cells_of(entry, columns, interval=not compared)
        table.add_row(arm, *size, *cells, *more_cells(result, arm))
    return table


def with_tables(readme: str, results: Path) -> str:
    """The text with every block `<!-- results/NAME.json --> ... <!-- end -->` written anew from
    results/NAME.json: by `eval.py RUN --update`, and by a test that compares."""

    def block(match: re.Match) -> str:
        file = results / f"{match[2]}.json"
        if not file.exists():
            return match[0]
        return match[1] + markdown(json.loads(file.read_text(encoding="utf-8"))) + match[3]

    return BLOCK.sub(block, readme)


def markdown(result: dict[str, Any]) -> str:
    """One result as a Markdown table and a list of facts."""
    columns = columns_of(result, short=True)
    headings = ["", "parameters", "TFLOPs", *columns, *more_headings(result)]
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for arm, entry in arms_in(result).items():
        size = [f"{entry['params']:,}", f"{entry['cost']['flops'] / 1e12:.2f}"]
        cells = [*cells_of(entry, columns, interval=False), *more_cells(result, arm)]
        lines.append(f"| {' | '.join([arm, *size, *cells])} |")
    stages = result["cost"]["stages"]
    where = result["environment"]["trained"]
    facts = [
        *facts_of(result),
        f"{sum(stage['seconds'] for stage in stages) / 60:.0f} minutes of work, shared by "
        f"{result['config']['workers']} processes of at most "
        f"{max(stage['peak_memory_mb'] for stage in stages)} MB, on {where['cores']} cores of "
        f"{where['cpu']}",
    ]
    return "\n".join([*lines, "", *(f"- {fact}" for fact in facts), ""])
