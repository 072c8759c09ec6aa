"""What log-probabilities give away of a model besides its answers: its hidden size.

    python -m measure.stealing http://127.0.0.1:8000/v1 --model quickstart --task pronounce

Logits are a linear map of H hidden values, so that those at many positions span a space of only H
dimensions, however large the vocabulary (Carlini et al. 2024, arXiv 2403.06634, section 4).
"""

import argparse
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from configs.command import run_command
from configs.files import say
from configs.schema import LabError, TaskConfig
from tasks import TASKS, load_task
from tasks.task import Task

if TYPE_CHECKING:
    from openai import OpenAI

GAP = 10.0  # between singular values, that tells the last dimension from rounding
FEW = 20  # log-probabilities that are shown, unless all are
BIAS = 60.0  # nats, by which tokens are brought among the few that are shown

Ask = Callable[[str, dict[str, float]], dict[str, float]]  # (prompt, bias) -> {token: log-prob}


def dimensions(logits: np.ndarray) -> int | None:
    """Of the space that rows [Q, V] span, up to a constant in each: the place of the largest gap
    between singular values; None if none stands out, or if there are too few rows."""
    values = singular_values(logits)
    ratios = values[:-1] / np.maximum(values[1:], values[0] * 1e-12)
    place = int(ratios.argmax())
    return place + 1 if len(ratios) and ratios[place] >= GAP else None


def singular_values(logits: np.ndarray) -> np.ndarray:
    """Of rows [Q, V], up to a constant in each, the largest first."""
    values = np.linalg.svd(logits - logits.mean(1, keepdims=True), compute_uv=False)
    return values[: min(len(logits), logits.shape[1] - 1)]


def as_shown(logits: np.ndarray) -> dict[str, np.ndarray]:
    """{how log-probabilities are shown: what can be known of logits [Q, V] from it}."""
    names = [str(token) for token in range(logits.shape[1])]

    def asked(row: np.ndarray, decimals: int | None) -> Ask:
        def ask(prompt: str, bias: dict[str, float]) -> dict[str, float]:
            raised = row + np.array([bias.get(name, 0.0) for name in names])
            shown = raised - np.logaddexp.reduce(raised)
            shown = shown if decimals is None else shown.round(decimals)
            return {names[place]: shown[place] for place in np.argsort(-raised)[:FEW]}

        return ask

    every = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    found = {"all": every, "all, 2 decimals": every.round(2), "all, 1 decimal": every.round(1)}
    for label, decimals in (("", None), (", 1 decimal", 1)):
        rows = [few_at_a_time(asked(row, decimals), "", FEW, names) for row in logits]
        found[f"{FEW} and logit_bias{label}"] = np.stack(rows)
    return found


def all_at_once(ask: Ask, prompt: str, names: list[str]) -> np.ndarray:
    """Log-probabilities [V] where all are shown."""
    found = ask(prompt, {})
    return np.array([found.get(name, np.nan) for name in names])


def few_at_a_time(ask: Ask, prompt: str, k: int, names: list[str]) -> np.ndarray:
    """Logits [V] less that of the first token, where k are shown and may be biased: each request
    lifts some tokens, and the first, above all others (section 4.3)."""
    found = np.zeros(len(names))
    for start in range(1, len(names), k - 1):
        group = [0, *range(start, min(start + k - 1, len(names)))]
        shown = ask(prompt, {str(token): BIAS for token in group})
        for token in group[1:]:
            found[token] = shown[names[token]] - shown[names[0]]
    return found


def asker(client: "OpenAI", model: str, shown: int) -> tuple[Ask, list[int]]:
    """A function that asks for one token, and the number of its requests."""
    from openai import APIStatusError

    requests = [0]

    def ask(prompt: str, bias: dict[str, float]) -> dict[str, float]:
        requests[0] += 1
        try:
            answer = client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": prompt}], max_tokens=1,
                temperature=0, logprobs=True, top_logprobs=shown, logit_bias=bias or None,
            )  # fmt: skip
        except APIStatusError as error:
            raise LabError(error.message) from None
        top = answer.choices[0].logprobs.content[0].top_logprobs
        return {one.token: one.logprob for one in top}

    return ask, requests


def steal(client: "OpenAI", model: str, task: Task, shown: int, positions: int) -> np.ndarray:
    """Logits [Q, V] at the first token of answers to so many prompts, each up to a constant."""
    names = [task.token_name(token) for token in range(task.vocabulary)]
    ask, requests = asker(client, model, min(shown, task.vocabulary))
    rows = task.rows("train")
    found = []
    for i in range(min(positions, len(rows))):
        prompt = task.question(rows, i * len(rows) // positions)
        found.append(
            all_at_once(ask, prompt, names)
            if shown >= task.vocabulary
            else few_at_a_time(ask, prompt, shown, names)
        )
    say(f"{requests[0]:,} requests")
    return np.array(found)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        "python -m measure.stealing", description=__doc__.splitlines()[0]
    )
    found.add_argument("url")
    found.add_argument("--model", required=True)
    found.add_argument("--task", required=True, choices=TASKS)
    found.add_argument("--shown", type=int, default=5, help="log-probabilities that a key is shown")
    found.add_argument("--positions", type=int, default=128, help="more than the hidden size")
    found.add_argument("--key-env", default="LAB_KEY", help="the variable with the key")
    return found


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    return run_command(lambda: run(options), "nothing was written")


def run(options: argparse.Namespace) -> int:
    from openai import OpenAI

    key, task = os.environ.get(options.key_env, ""), load_task(TaskConfig(name=options.task))
    with OpenAI(base_url=options.url, api_key=key or "none") as client:
        logits = steal(client, options.model, task, options.shown, options.positions)
    size = dimensions(logits)
    if size is None:
        say("no dimension stands out: the log-probabilities are rounded, or the positions too few")
    else:
        say(f"the hidden size of {options.model} is {size}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
