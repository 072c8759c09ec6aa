"""Test-time scaling: what does thinking longer, or more often, buy a model?

Every point says what it costs: tokens written per problem and FLOPs per problem, counted.
"""

from collections import Counter
from typing import Any

import numpy as np
import torch
from statsmodels.stats.proportion import proportion_confint

from configs.schema import Recipe
from measure.cost import CountedForward
from tasks.reason import Reason, first_wrong_step, read_solution
from tasks.rows import Rows
from teacher.model import answers_of

BUDGETS = (0, 4, 8, 12, 16, 24, 32, 48, 64)  # tokens after <think>, then an answer is forced
SAMPLES = 64  # answers to every problem, drawn at TEMPERATURE
VOTES = (1, 4, 16, 64)
TEMPERATURE = 1.0
PROBLEMS = 100  # that the curves are made from


def asked_problems(rows: Rows) -> Rows:
    """PROBLEMS of them, evenly drawn: rows stand in the order of their number of steps."""
    count = min(PROBLEMS, len(rows))
    return rows.take(np.arange(count) * len(rows) // count)


def thinking_curve(model: CountedForward, task: Reason, rows: Rows) -> list[dict[str, Any]]:
    """Accuracy when the trace is cut after so many tokens and an answer is forced
    (Muennighoff et al. 2025 (s1), arXiv 2501.19393, section 3)."""
    points = []
    for budget in BUDGETS:
        before, written, right = model.flops, 0, 0
        options = {"budget": 1 + budget, "closing": task.closing}  # <think> itself is no thought
        for i, answer in answers_of(model, rows, **plain(task), **options):
            written += len(answer.tokens)
            right += said(task, answer.tokens) == truth(task, rows, i)
        points.append(point(budget, right / len(rows), written, model.flops - before, len(rows)))
    return points


def voting_curve(
    model: CountedForward, task: Reason, rows: Rows, seed: int
) -> list[dict[str, Any]]:
    """Accuracy of the commonest answer among so many drawn ones (Wang et al. 2022,
    self-consistency, arXiv 2203.11171); an answer that is no number has no vote. Fewer votes than
    SAMPLES are averaged over as many groups as there are."""
    before, tokens = model.flops, 0
    again = rows.take(np.repeat(np.arange(len(rows)), SAMPLES))
    answers: list[int | None] = [None] * len(again)
    generator = torch.Generator().manual_seed(seed)
    options = {"temperature": TEMPERATURE, "generator": generator}
    for i, answer in answers_of(model, again, **plain(task), **options):
        tokens += len(answer.tokens)
        answers[i] = said(task, answer.tokens)
    flops = model.flops - before
    drawn = [answers[i : i + SAMPLES] for i in range(0, len(answers), SAMPLES)]
    points = []
    for votes in VOTES:
        right = [
            commonest(group[start : start + votes]) == truth(task, rows, i)
            for i, group in enumerate(drawn)
            for start in range(0, SAMPLES, votes)
        ]
        share = votes / SAMPLES
        accuracy = float(np.mean(right))
        points.append(point(votes, accuracy, share * tokens, share * flops, len(rows)))
    return points


def point(
    amount: int, accuracy: float, tokens: float, flops: float, problems: int
) -> dict[str, Any]:
    """Of a curve; the interval is over problems alone (Wilson 1927)."""
    right = round(accuracy * problems)
    return {
        "amount": amount,
        "accuracy": accuracy,
        "ci95": list(map(float, proportion_confint(right, problems, method="wilson"))),
        "tokens_per_problem": tokens / problems,
        "flops_per_problem": flops / problems,
    }


def plain(task: Reason) -> dict[str, Any]:
    return {
        "longest": task.longest_answer,
        "end": task.tokenizer.eos_token_id,
        "vocabulary": len(task.tokenizer),
    }


def said(task: Reason, tokens: torch.Tensor) -> int | None:
    """The number that an answer ends with."""
    return read_solution(task.render(tokens.tolist())).answer


def truth(task: Reason, rows: Rows, i: int) -> int:
    return int(task.by_id[int(rows.ids[i])].answer)


def commonest(answers: list[int | None]) -> int | None:
    """The answer with the most votes; of several, the one that came first."""
    votes = Counter(answer for answer in answers if answer is not None)
    return votes.most_common(1)[0][0] if votes else None


def first_wrong_steps(task: Reason, rows: Rows, texts: list[str]) -> dict[str, list[int]]:
    """{number of steps: [problems without a wrong step, with the first wrong step 1, 2, ...]}; the
    last is one step too many."""
    found: dict[str, list[int]] = {}
    for i, text in enumerate(texts):
        problem = task.by_id[int(rows.ids[i])]
        count = len(problem.steps)
        histogram = found.setdefault(str(count), [0] * (count + 2))
        histogram[first_wrong_step(read_solution(text).steps, problem.steps) or 0] += 1
    return found


def reasoning(
    model: CountedForward, task: Reason, rows: Rows, texts: list[str], thinks: bool, seed: int
) -> dict[str, Any]:
    """What eval.json says of how one model thinks. A model that was taught answers alone, so that
    it never `thinks`, has no budget to cut."""
    asked = asked_problems(rows)
    return {
        "first_wrong_step": first_wrong_steps(task, rows, texts) if thinks else None,
        "thinking": thinking_curve(model, task, asked) if thinks else None,
        "voting": voting_curve(model, task, asked, seed),
    }


# What may differ between two recipes of a pair: what the teacher's traces reveal, and how a student
# is held to it.
OF_TRACES = {
    "traces", "access", "k", "stored_as", "hidden_layers", "objective", "temperature",
    "temperature_squared", "beta", "skew", "head", "sampling_temperature",
}  # fmt: skip


def pairs_of_traces(recipes: dict[str, Recipe]) -> list[tuple[str, str]]:
    """(taught by traces, taught by answers alone): students of one shape and budget that a teacher
    answered as many problems for. The traces may come with soft targets, which answers alone cannot
    have."""

    def rest(recipe: Recipe) -> dict[str, Any]:
        return recipe.model_dump(exclude=OF_TRACES)

    return [
        (name, other)
        for other, without in recipes.items()
        if without.traces == "none"
        for name, recipe in recipes.items()
        if recipe.traces != "none" and rest(recipe) == rest(without)
    ]
