"""Which figures a run has."""

from typing import Any

from measure.laws import students_differing_in
from measure.report.drawing import Styles
from measure.report.figures import MANY, cost_bars, fidelity_against_cost, learning_curves
from measure.report.studies import (
    ACCESS_KEYS,
    accuracy_by_steps,
    bytes_against_kl,
    damage_against_price,
    divergence_against_prompts,
    fidelity_by_temperature,
    first_wrong_steps,
    quality_against_cost,
    quality_against_payment,
    scaling,
    spectrum,
    thinking_longer,
    where_traces_pay,
)
from measure.report.tables import had_the_machine, task_of

Figure = tuple[str, list[str], str]  # title, SVG elements, caption


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
    if result.get("bought"):
        pairs = [(name, cost) for name in result["bought"]["needs"] for cost in ("tokens", "money")]
        found.append(
            (
                "What an API key buys",
                [quality_against_payment(result, *pair) for pair in pairs],
                "Students by what the API showed them, at the same FLOPs, against what their "
                "outputs cost. Dashed: all of the teacher's own data, and 5 % of it.",
            )
        )
    if result.get("defence"):
        found.append(
            (
                "What a defence costs, and prevents",
                [
                    divergence_against_prompts(result),
                    damage_against_price(result),
                    *([spectrum(result)] if result["defence"].get("stealing") else []),
                ],
                "The best student that an extractor gets, by what it is shown and how many prompts "
                "it asks. Dashed: all of the teacher's own data, and 5 % of it. Then each defence "
                "by what it costs customers and what it takes from the extractor with the most "
                "prompts; good defences are at the top left. Last: what log-probabilities give "
                "away of the teacher's size; a fall at the line gives it away.",
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
