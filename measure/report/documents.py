"""Results in the README and docs/: Markdown that `eval.py RUN --update` writes."""

import json
import math
import re
from pathlib import Path
from typing import Any

from configs.files import say, write_atomically, write_json
from measure.metrics import AGREEMENT, DIVERGENCE, metrics_in
from measure.report.counted import tables_of_study
from measure.report.sentences import facts_of
from measure.report.tables import (
    cells_of,
    had_the_machine,
    models_table,
    more_tables,
    task_of,
)

BLOCK = re.compile(r"(<!-- (\w+)/(\S+)\.json -->\n)(.*?)(<!-- end -->)", re.DOTALL)
NAMED = re.compile(r"`(\w+)`")
ABOUT = re.compile(r"About \d+ minutes")


def with_tables(page: str, results: Path) -> str:
    """The text with every block rewritten from results/NAME.json: `<!-- results/NAME.json --> ...
    <!-- end -->` holds the tables and findings, `table` only the models, `answers` some answers,
    `study` what a study of detection or evidence counted; `column` is a table whose last column
    holds the results of the recipes named in the one before. `eval.py RUN --update` writes
    it, and a test compares it."""

    def block(match: re.Match) -> str:
        file = results / f"{match[3]}.json"
        result = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
        if result is None:
            return match[0]
        if match[2] == "column":
            return match[1] + with_column(match[4], result) + match[5]
        write = {
            "results": markdown,
            "table": table_of_models,
            "answers": table_of_answers,
            "study": markdown_of_study,
        }
        return match[1] + write[match[2]](result) + match[5]

    return BLOCK.sub(block, page)


def with_minutes(config: str, result: dict[str, Any]) -> str:
    """The text of a config with the minutes that its run took in `About 5 minutes`, rounded up; a
    run that shared the machine says nothing about them."""
    if not had_the_machine(result):
        return config
    seconds, workers = 0.0, result["config"]["workers"]
    for stage in result["cost"]["stages"]:
        side_by_side = workers if stage["stage"].startswith("students/") else 1
        seconds += stage["seconds"] / side_by_side if stage["stage"] != "tuning" else 0
    return ABOUT.sub(f"About {math.ceil(seconds / 60)} minutes", config, count=1)


def shared_with_others(result: dict[str, Any]) -> str:
    """Nothing, for a run that had the machine to itself."""
    if had_the_machine(result):
        return ""
    load = 100 * result["cost"]["load_of_others"]
    return f", shared with other programs ({load:.0f} % of its work)"


def times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def markdown(result: dict[str, Any]) -> str:
    """One result as a Markdown table and a list of facts."""
    text = table_of_models(result)
    for title, headings, rows in more_tables(result):
        text += f"\n{title}:\n\n{table(headings, rows)}"
    facts = [*facts_of(result), work_line(result)]
    return "\n".join([text, *(f"- {fact}" for fact in facts), ""])


def markdown_of_study(study: dict[str, Any]) -> str:
    """Its tables, then its claims."""
    text = "\n".join(
        f"{title}:\n\n{table(headings, rows)}" for title, headings, rows in tables_of_study(study)
    )
    claims = [f"- {one['result']}: {one['claim']}" for one in study["claims"]]
    return "\n".join([text, *claims, ""])


def table(headings: list[str], rows: list[list[str]]) -> str:
    first, *others = (f"| {' | '.join(line)} |" for line in (headings, *rows))
    return "\n".join([first, "|---" * len(headings) + "|", *others, ""])


def table_of_models(result: dict[str, Any]) -> str:
    _, headings, rows = models_table(result, interval=False)
    return table(headings, rows)


def with_column(text: str, result: dict[str, Any]) -> str:
    """A table with its last column rewritten: agreement with the teacher and divergence from it of
    each student named in the column before."""
    metrics = metrics_in(result)
    shown = {name: metrics[name] for name in (AGREEMENT, DIVERGENCE)}
    title, _, *rows = [
        [cell.strip() for cell in line.strip().strip("|").split("|")]
        for line in text.strip().splitlines()
    ]
    title[-1] = "agreement %, KL"
    for row in rows:
        names = [name for name in NAMED.findall(row[-2]) if name in result["students"]]
        cells = [", ".join(cells_of(result["students"][n], shown, interval=False)) for n in names]
        row[-1] = "; ".join(cells) or "-"
    return table(title, rows)


def table_of_answers(result: dict[str, Any]) -> str:
    """The examples of the result, wrong answers marked."""
    models = list(result["examples"][0]["answers"])
    rows = [
        [
            row["question"],
            " or ".join(row["truths"]),
            *(f"{a['text']}{' ✗' * (a['grade'] == 'wrong')}" for a in row["answers"].values()),
        ]
        for row in result["examples"]
    ]
    return table([task_of(result).item_noun, "right", *models], rows)


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


# -- writing ---------------------------------------------------------------------------------------


def publish_study(study: dict[str, Any], out: Path | None) -> None:
    """Print what a study decided, and write it; one in results/ is shown in the README and docs/,
    too."""
    for one in study["claims"]:
        say(f"{one['result']}: {one['claim']}")
    if out:
        write_json(out, study)
        rewrite_pages(out.resolve().parent)


def rewrite_pages(results: Path) -> None:
    """The README and docs/ beside a folder of results, with its tables."""
    for page in pages(results.parent):
        if page.exists():
            write_atomically(page, with_tables(page.read_text(encoding="utf-8"), results))


def pages(root: Path) -> list[Path]:
    """The documents that may show results."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]
