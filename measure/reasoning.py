"""Test-time scaling: what a model gains from a longer reasoning trace or from several votes.

Every point carries its cost: tokens written and counted FLOPs per problem.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from scipy import stats

from configs.schema import Recipe
from models.generate import answers_of
from models.language import Forward
from models.rows import Rows
from tasks.task import Task

THINKING_TOKENS = (0, 4, 8, 12, 16, 24, 32, 48, 64)  # then an answer is forced
SAMPLES = 64  # answers to every problem, drawn at TEMPERATURE
VOTES = (1, 4, 16, 64)
TEMPERATURE = 1.0
PROBLEMS = 100  # per curve


def asked_problems(rows: Rows) -> Rows:
    """PROBLEMS of the rows, evenly spaced: rows are sorted by their number of steps."""
    count = min(PROBLEMS, len(rows))
    return rows.take(np.arange(count) * len(rows) // count)


def thinking_curve(model: Forward, task: Task, rows: Rows) -> list[dict[str, Any]]:
    """Accuracy when the reasoning is cut after a number of tokens and an answer is forced
    (Muennighoff et al. 2025 (s1), arXiv 2501.19393, section 3)."""
    points = []
    for thinking in THINKING_TOKENS:
        before, written, right = model.flops, 0, 0
        cut = {
            "max_thinking_tokens": 1 + thinking,  # the opening mark is the first
            "end_of_reasoning": task.end_of_reasoning,
        }
        for i, answer in answers_of(model, rows, **generation_options(task), **cut):
            written += len(answer.tokens)
            right += final_answer(task, answer.tokens) == task.true_answer(rows, i)
        flops = model.flops - before
        points.append(curve_point(thinking, right / len(rows), written, flops, len(rows)))
    return points


def voting_curve(model: Forward, task: Task, rows: Rows, seed: int) -> list[dict[str, Any]]:
    """Accuracy of the majority among several sampled answers (Wang et al. 2022, self-consistency,
    arXiv 2203.11171); an answer without a number has no vote. For fewer votes than SAMPLES,
    accuracy is averaged over all groups of that size."""
    before, tokens = model.flops, 0
    repeated = rows.take(np.repeat(np.arange(len(rows)), SAMPLES))
    answers: list[int | None] = [None] * len(repeated)
    generator = torch.Generator().manual_seed(seed)
    sampled = {"temperature": TEMPERATURE, "generator": generator}
    for i, answer in answers_of(model, repeated, **generation_options(task), **sampled):
        tokens += len(answer.tokens)
        answers[i] = final_answer(task, answer.tokens)
    flops = model.flops - before
    by_problem = [answers[i : i + SAMPLES] for i in range(0, len(answers), SAMPLES)]
    points = []
    for votes in VOTES:
        right = [
            majority(group[start : start + votes]) == task.true_answer(rows, i)
            for i, group in enumerate(by_problem)
            for start in range(0, SAMPLES, votes)
        ]
        share, accuracy = votes / SAMPLES, float(np.mean(right))
        points.append(curve_point(votes, accuracy, share * tokens, share * flops, len(rows)))
    return points


def curve_point(
    amount: int, accuracy: float, tokens: float, flops: float, problems: int
) -> dict[str, Any]:
    """The interval is over problems only (Wilson 1927)."""
    right = stats.binomtest(round(accuracy * problems), problems)
    return {
        "amount": amount,
        "accuracy": accuracy,
        "ci95": list(map(float, right.proportion_ci(method="wilson"))),
        "tokens_per_problem": tokens / problems,
        "flops_per_problem": flops / problems,
    }


def generation_options(task: Task) -> dict[str, Any]:
    return {"longest": task.longest_answer, "end": task.end, "vocabulary": task.vocabulary}


def final_answer(task: Task, tokens: torch.Tensor) -> int | None:
    """The number that an answer ends with."""
    return task.final_answer(task.render(tokens.tolist()))


def majority(answers: list[int | None]) -> int | None:
    """The answer with the most votes; ties go to the first."""
    votes = Counter(answer for answer in answers if answer is not None)
    return votes.most_common(1)[0][0] if votes else None


def first_wrong_steps(task: Task, rows: Rows, texts: list[str]) -> dict[str, list[int]]:
    """{number of steps: [problems without a wrong step, with the first wrong step 1, 2, ...]}; the
    last entry counts superfluous steps."""
    found: dict[str, list[int]] = {}
    for i, text in enumerate(texts):
        count = task.step_count(rows, i)
        histogram = found.setdefault(str(count), [0] * (count + 2))
        histogram[task.first_wrong_step(rows, i, text) or 0] += 1
    return found


def reasoning(
    model: Forward, task: Task, rows: Rows, texts: list[str], writes_reasoning: bool, seed: int
) -> dict[str, Any]:
    """How one model reasons on a split; a model trained only on answers has no trace to cut."""
    asked = asked_problems(rows)
    return {
        "first_wrong_step": first_wrong_steps(task, rows, texts) if writes_reasoning else None,
        "thinking": thinking_curve(model, task, asked) if writes_reasoning else None,
        "voting": voting_curve(model, task, asked, seed),
    }


def pairs_of_traces(recipes: dict[str, Recipe]) -> list[tuple[str, str]]:
    """(trained on traces, trained only on their answers): students of the same shape and budget,
    from the same number of problems. Only what the traces reveal and how they are matched may
    differ: soft targets, for instance, exist only for traces."""

    def common(recipe: Recipe) -> dict[str, Any]:
        outputs = recipe.outputs.model_dump(exclude={"traces", "k", "layers", "temperature"})
        rest = recipe.model_dump(exclude={"outputs", "access", "objective", "temperature"})
        return {**rest, "outputs": outputs, "divergence": None}

    return [
        (name, other)
        for other, without in recipes.items()
        if without.outputs.traces == "none"
        for name, recipe in recipes.items()
        if recipe.outputs.traces != "none" and common(recipe) == common(without)
    ]


def steps_by_split(task: type[Task] | Task, splits: Iterable[str]) -> list[tuple[str, int]]:
    """(split, number of steps) for every number of steps in these splits."""
    return [(split, steps) for split in splits for steps in task.steps.get(split, ())]
