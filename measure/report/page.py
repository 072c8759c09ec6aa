"""The report: one self-contained HTML file with the story, claims, figures, tables and examples.

It reads eval.json, the log and the evaluations, and computes no metrics.
"""

import re
from pathlib import Path
from typing import Any

import jinja2
import yaml

from configs.schema import CONTROLS
from measure.evaluate import Evaluation, TeacherReference
from measure.metrics import CALIBRATION, metrics_in
from measure.report.answers import (
    SHOWN_POSITIONS,
    chosen_answers,
    dark_knowledge,
    filters_of,
)
from measure.report.drawing import styles_of
from measure.report.figures import forest, reliability, strips
from measure.report.gallery import cost_figures, figures_of
from measure.report.sentences import facts_of
from measure.report.story import (
    cards,
    conclusion,
    models_side_by_side,
    revealed_by,
    shown_students,
    where_worse,
)
from measure.report.tables import (
    Columns,
    ShownTable,
    cells_of,
    columns_of,
    cost_cell,
    fixed,
    heading,
    models_in,
    more_cells,
    more_headings,
    more_tables,
    parameters,
    per_seed_values,
    task_of,
    value_in,
)
from tasks.task import Task
from teacher.access import ACCESS

TERMS = {
    "teacher": "the larger model, trained on the data",
    "student": "a smaller model that learns from the teacher's outputs",
    "outputs": "what the teacher reveals of the transfer rows: answers, probabilities, states",
    "access": "how much of the teacher is revealed, from a closed API to open weights",
    "control": "a model of the student's size and cost that rules out another explanation",
    "held-out": "rows that no model was trained on and by which nothing was chosen",
    "FLOPs": "floating-point operations of the matrix products, counted on the real models",
    "seed": "the number that decides the starting weights and the order of the data",
    "interval": "of intervals made this way, 95 % contain the value that all rows (and all seeds, "
    "where there are several) would give",
    "better, worse": "models that were equal would differ so much in fewer than 5 % of cases, "
    "corrected for the number of models that are compared with the same one; from one seed, it "
    "holds for these two trained models only",
    "not distinguished": "the data do not decide which of the two is better; not the same as equal",
}

SPEED = {"latency_ms": 1, "answers_per_second": 0}  # digits; not measured of an endpoint


def render_report(
    log: list[dict[str, Any]],
    result: dict[str, Any],
    reference: TeacherReference,
    first: dict[str, Evaluation],
) -> str:
    """HTML. log: the lines of metrics.jsonl. first: the first seed of every model on the held-out
    rows of `reference`."""
    students, task = shown_students(result), reference.task
    models = models_side_by_side(result)
    page = template("report.html").render(
        result=result,
        name=result["config"]["name"],
        students=students,
        item=task.item_noun,
        position=task.position_noun,
        result_rows=len(reference.rows),
        cards=cards(result),
        conclusion=conclusion(result),
        worse=where_worse(result),
        forest=forest(result),
        claims=more_tables(result),
        facts=facts_of(result),
        tables=results_tables(result, task),
        costs=cost_figures(result),
        stages=stages_table(result),
        figures=figures_of(log, result, styles_of(list(models_in(result)))),
        models=models,
        answers=chosen_answers(reference, first, models),
        graded="wrong" in first[students[0]].columns,
        shown_positions=SHOWN_POSITIONS,
        filters=filters_of(reference, first, students[0]),
        uncertain=dark_knowledge(reference),
        reliability=[
            reliability(first[name], name) for name in models if CALIBRATION in first[name].columns
        ],
        tuning=tuning_table(result),
        glossary=glossary(result),
        config=yaml.safe_dump(
            {k: v for k, v in result["config"].items() if k != "tuned"}, sort_keys=False
        ),
        command=result["environment"]["trained"]["command"],
    )
    return with_whole_numbers(page)


def with_whole_numbers(page: str) -> str:
    """No line ends between a number and its percent sign."""
    return re.sub(r"(?<=\d) %", "\N{NO-BREAK SPACE}%", page)


def template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


# -- tables ----------------------------------------------------------------------------------------


def results_tables(result: dict[str, Any], task: Task) -> list[ShownTable]:
    """A table per split: every model in every metric."""
    columns, models = columns_of(result), models_in(result)
    headings = [
        "model",
        "parameters",
        "cost %",
        "training TFLOPs",
        *map(heading, columns.values()),
        "ms per answer",
        "answers per s",
        *more_headings(result),
    ]
    main = "held-out" if result["split"] == "heldout" else result["split"]
    splits = {f"{main} {task.item_noun}": models}
    for split in task.evaluation_splits[1:]:
        if split in result["teacher"]:
            of_split = {name: {**entry, **entry[split]} for name, entry in models.items()}
            splits[f"{split} {task.item_noun}"] = of_split
    return [
        without_empty_columns(
            title,
            headings,
            [
                [name, *report_cells(result, name, entry, columns), *more_cells(result, name)]
                for name, entry in entries.items()
            ],
        )
        for title, entries in splits.items()
    ]


def without_empty_columns(title: str, headings: list[str], rows: list[list[str]]) -> ShownTable:
    """A split has only some of the metrics: no problem has six steps where all have five."""
    kept = [i for i in range(len(headings)) if any(row[i] != "-" for row in rows)]
    return title, [headings[i] for i in kept], [[row[i] for i in kept] for row in rows]


def report_cells(
    result: dict[str, Any], name: str, entry: dict[str, Any], columns: Columns
) -> list[str]:
    cost = entry["cost"]
    return [
        parameters(entry),
        cost_cell(result, name),
        f"{cost['flops'] / 1e12:.2f}",
        *cells_of(entry, columns, interval=True),
        *(f"{cost[key]:.{digits}f}" if key in cost else "-" for key, digits in SPEED.items()),
    ]


def stages_table(result: dict[str, Any]) -> ShownTable:
    """What each stage of the run cost."""
    headings = ["stage", "TFLOPs", "seconds", "writing %", "joules", "money", "peak memory MB"]
    rows = [
        [
            stage["stage"],
            f"{stage['flops'] / 1e12:.3f}",
            f"{stage['seconds']:.1f}",
            f"{100 * stage['writing_share']:.0f}" if "writing_share" in stage else "-",
            f"{stage['joules']:.0f}",
            f"{stage['money']:.5f} {stage['currency']}",
            f"{stage['peak_memory_mb']}",
        ]
        for stage in result["cost"]["stages"]
    ]
    return "Every stage of the run", headings, rows


def tuning_table(result: dict[str, Any]) -> ShownTable | None:
    """A row per try, the best of each model first; metrics on the validation split."""
    tuned, metrics, table = result["config"].get("tuned"), metrics_in(result), task_of(result).table
    if not tuned:
        return None
    headings = ["model", "used", "learning rate", "transfer rows"]
    rows = []
    for name, tries in tuned["tries"].items():
        for number, one in enumerate(tries):
            values = [
                fixed(metrics[key].scale * one["validation"][key], metrics[key].digits)
                if key in one["validation"]
                else "-"
                for key in table
            ]
            count = f"{one['transfer_rows']:,}" if one["transfer_rows"] else "-"
            best = "-" if number else "best"
            rows.append([name, best, f"{one['learning_rate']:g}", count, *values])
    return "Every try", [*headings, *(heading(metrics[key]) for key in table)], rows


def glossary(result: dict[str, Any]) -> dict[str, str]:
    """The terms on the page, with their meaning."""
    levels = {entry["recipe"]["access"] for entry in result["students"].values()}
    return {
        **TERMS,
        **{
            f"access {n}": f"reveals {revealed_by(n, task_of(result))}"
            for n in ACCESS
            if n in levels
        },
        **{f"control {n}": CONTROLS[n] for n in CONTROLS if n in result["controls"]},
        **{
            metric.heading: metric.meaning
            for name, metric in metrics_in(result).items()
            if metric.meaning and any(value_in(one, name) for one in models_in(result).values())
        },
    }


# -- the picture in the README ---------------------------------------------------------------------


def render_picture(result: dict[str, Any]) -> str:
    """The story of a run as an SVG file that follows the colours of the page around it."""
    story, pitch = cards(result), 92
    teacher = story["teacher"][0]
    known = [teacher.name, teacher.params, teacher.quality, teacher.learns]
    rows, sources, top = [], [], 0
    for group, lines, edge in (
        ("taught", known, "var(--ink)"),
        ("untaught", ["the data", "without the teacher"], "var(--grey)"),
    ):
        count = len(story[group])
        middle = top + (count * pitch - 10) / 2
        sources.append({"y": middle - (19 * len(lines) + 16) / 2, "lines": lines, "edge": edge})
        edge = "var(--taught)" if group == "taught" else "var(--grey)"
        for card in story[group]:
            rows.append({"y": top, "card": card, "edge": edge})
            top += pitch
    label = " ".join(conclusion(result))
    return template("story.svg").render(height=top - 8, label=label, sources=sources, rows=rows)


# -- the page of a check ---------------------------------------------------------------------------


def render_check(result: dict[str, Any], reference: dict[str, Any], lines: list[str]) -> str:
    """HTML of a check: its lines, and every metric against the band of the committed seeds."""
    bands = reference.get("bands") or {}
    return with_whole_numbers(
        template("check.html").render(
            name=result["config"]["name"],
            lines=lines,
            seeds=max((len(band["values"]) for band in bands.values()), default=0),
            figure=strips(per_seed_values(result), bands) if bands else None,
        )
    )
