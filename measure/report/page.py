"""The report: one self-contained HTML file with the story, claims, figures, tables and examples.

It reads eval.json, the log and the evaluations, and computes no metrics.
"""

from pathlib import Path
from typing import Any

import jinja2
import yaml

from configs.schema import CONTROLS
from measure.evaluate import Evaluation, TeacherReference
from measure.laws import students_differing_in
from measure.metrics import CALIBRATION, metrics_in
from measure.report.answers import chosen_answers, dark_knowledge, filters_of
from measure.report.drawing import Styles, styles_of
from measure.report.figures import (
    MANY,
    cost_bars,
    fidelity_against_cost,
    forest,
    learning_curves,
    reliability,
    strips,
)
from measure.report.sentences import facts_of
from measure.report.story import (
    cards,
    conclusion,
    models_side_by_side,
    shown_students,
    where_worse,
)
from measure.report.studies import (
    ACCESS_KEYS,
    accuracy_by_steps,
    bytes_against_kl,
    fidelity_by_temperature,
    first_wrong_steps,
    quality_against_cost,
    scaling,
    thinking_longer,
    where_traces_pay,
)
from measure.report.tables import (
    Columns,
    ShownTable,
    cells_of,
    columns_of,
    cost_cell,
    fixed,
    had_the_machine,
    heading,
    models_in,
    more_cells,
    more_headings,
    more_tables,
    per_seed_values,
    task_of,
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

Figure = tuple[str, list[str], str]  # title, SVG elements, caption


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
    return template("report.html").render(
        result=result,
        name=result["config"]["name"],
        students=students,
        item=task.item_noun,
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
        (
            title,
            headings,
            [
                [name, *report_cells(result, name, entry, columns), *more_cells(result, name)]
                for name, entry in entries.items()
            ],
        )
        for title, entries in splits.items()
    ]


def report_cells(
    result: dict[str, Any], name: str, entry: dict[str, Any], columns: Columns
) -> list[str]:
    cost = entry["cost"]
    return [
        f"{entry['params']:,}",
        cost_cell(result, name),
        f"{cost['flops'] / 1e12:.2f}",
        *cells_of(entry, columns, interval=True),
        f"{cost['latency_ms']:.1f}",
        f"{cost['answers_per_second']:.0f}",
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
        **{f"access {n}": f"reveals {ACCESS[n].meaning}" for n in ACCESS if n in levels},
        **{f"control {n}": CONTROLS[n] for n in CONTROLS if n in result["controls"]},
        **{m.heading: m.meaning for m in metrics_in(result).values() if m.meaning},
    }


# -- figures ---------------------------------------------------------------------------------------


def cost_figures(result: dict[str, Any]) -> list[str]:
    """FLOPs, which the budget sets; seconds, where the run had the machine to itself."""
    if not result["cost"]["fraction_of_teacher"]["flops"]:
        return []
    return [cost_bars(result, key) for key in ("flops", "seconds")[: 1 + had_the_machine(result)]]


def figures_of(log: list[dict[str, Any]], result: dict[str, Any], styles: Styles) -> list[Figure]:
    """The figures that apply to this run."""
    unreasoned = [
        n for n, e in result["students"].items() if e["recipe"]["outputs"]["traces"] == "none"
    ]
    without = f" For {', '.join(unreasoned)}, over the answers only." if unreasoned else ""
    grey = " Grey: the teacher and the first student." if len(styles) > MANY else ""
    found = [
        (
            "Learning curves",
            [learning_curves(log, styles)],
            f"Validation loss in nats per token during training, against the FLOPs spent.{without} "
            f"One line per seed.{grey}",
        )
    ]
    shares = result["cost"]["fraction_of_teacher_by_student"].values()
    flops = [share["flops"] for share in shares if share["flops"]]
    if flops and max(flops) > 1.2 * min(flops) and not result.get("savings"):
        found.append(
            (
                "Fidelity against cost",
                [fidelity_against_cost(result, styles, "flops")],
                "How closely a student follows the teacher, against its cost, outputs included. "
                "Dashed: the Pareto front.",
            )
        )
    return [*found, *study_figures(result, styles), *reasoning_figures(result, styles)]


def study_figures(result: dict[str, Any], styles: Styles) -> list[Figure]:
    """Figures of studies of access, temperature, budgets, rows and size."""
    items, laws, found = task_of(result).item_noun, result["laws"], []
    if len(students_differing_in(result, ACCESS_KEYS)) > 2:
        found.append(
            (
                "Bytes against fidelity",
                [bytes_against_kl(result, styles)],
                "Students whose recipes differ only in what the teacher reveals: their divergence "
                "from it, against the bytes per token of its outputs.",
            )
        )
    if len(students_differing_in(result, ("temperature",))) > 2:
        found.append(
            (
                "Temperature",
                [fidelity_by_temperature(result)],
                "Students whose recipes differ only in temperature.",
            )
        )
    saved = result.get("savings")
    if saved:
        found.append(
            (
                "Quality and fidelity against cost",
                [quality_against_cost(result, name) for name in saved["needs"]],
                "Students of each kind at several budgets, tuned at each; cost with outputs.",
            )
        )
    if "rows" in laws:
        label = f"different {items} that the teacher answers"
        found.append(
            (
                f"How many {items}",
                [scaling(result, laws["rows"], label, styles)],
                f"Students that differ only in how many {items} the teacher answered, trained "
                "equally long. Dashed: the best-fitting power law with a constant.",
            )
        )
    if "size" in laws:
        label = "the student's share of the teacher's parameters"
        found.append(
            (
                "How large a student",
                [scaling(result, laws["size"], label, styles)],
                "Students that differ only in size, at the same FLOPs: small ones train for many "
                "steps, large ones for few. Dashed: the best-fitting sum of two power laws, one "
                "that falls with size (the capacity gap) and one that rises (too few steps).",
            )
        )
    return found


def reasoning_figures(result: dict[str, Any], styles: Styles) -> list[Figure]:
    """Figures of a task whose solutions have steps."""
    if "reasoning" not in result["teacher"]:
        return []
    found = [
        (
            "Accuracy by number of steps",
            [accuracy_by_steps(result, styles)],
            f"Right answers to held-out problems. All students cost the same "
            f"FLOPs{smaller_budgets(result)}.",
        ),
        (
            "Test-time scaling",
            [thinking_longer(result, styles)],
            "Solid: the reasoning is cut after a number of tokens and an answer is forced. Dashed: "
            "the majority of 1, 4, 16 and 64 sampled answers. First seed of every model, 100 "
            "problems each.",
        ),
        (
            "Where traces go wrong",
            [first_wrong_steps(result, styles)],
            "The remaining traces have no wrong step. First seed of every model.",
        ),
    ]
    if result["map"]:
        found.append(
            (
                "Where traces pay",
                [where_traces_pay(result)],
                "By how many points of right answers a student trained on traces is ahead (blue; "
                "red: behind) of one trained only on answers, with the same size (thousands of "
                "parameters), number of problems and FLOPs (in % of the teacher's). ?: not "
                "distinguished, all cells corrected together. Chains of one or two steps also "
                "occur inside training traces, but not in answers without traces.",
            )
        )
    return found


def smaller_budgets(result: dict[str, Any]) -> str:
    """`, except those with a smaller share of it: warm`, if there are any."""
    students = result["students"].items()
    smaller = [n for n, entry in students if entry["recipe"]["student"]["budget_fraction"] < 1]
    return f", except those with a smaller share of it: {', '.join(smaller)}" if smaller else ""


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
    return template("check.html").render(
        name=result["config"]["name"],
        lines=lines,
        seeds=max((len(band["values"]) for band in bands.values()), default=0),
        figure=strips(per_seed_values(result), bands) if bands else None,
    )
