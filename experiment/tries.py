"""The tries of a config's section `tune`: which they are, which is best, what they depend on."""

import itertools

import numpy as np

from configs.files import sha256_of_json
from configs.schema import MACHINE_KEYS, Config, Recipe, Try
from tasks.task import Metric
from teacher.access import needs_outputs

# Keys of a config that change no student.
NOT_TUNED = ("verdicts", "compare", "tune", "tuned")
# Keys that change which students there are, or where they are trained, but not each of them.
PER_RUN = (*MACHINE_KEYS, "seeds", "controls")


def tries_of(config: Config, name: str, recipe: Recipe) -> list[Try]:
    """The tries of a recipe or control, not evaluated yet."""
    tune, rates = config.tune, config.tune.rates(name)
    fixed = not needs_outputs(recipe) or recipe.outputs.transfer_rows is not None
    if tune.transfer_rows and not fixed:
        pairs = itertools.product(rates, tune.transfer_rows)
        return [Try(learning_rate=r, transfer_rows=n, validation={}) for r, n in pairs]
    if tune.tries > len(rates):
        rates = np.geomspace(min(rates), max(rates), tune.tries)
    return [Try(learning_rate=float(f"{rate:.3g}"), validation={}) for rate in rates]


def untuned(config: Config, name: str, recipe: Recipe) -> Recipe:
    """A recipe or control without what its best try filled in."""
    best = config.best_try(name)
    if best is None:
        return recipe
    student, outputs = recipe.student, recipe.outputs
    if student.learning_rate == best.learning_rate:
        student = student.model_copy(update={"learning_rate": None})
    if best.transfer_rows and outputs.transfer_rows == best.transfer_rows:
        outputs = outputs.model_copy(update={"transfer_rows": None})
    return recipe.model_copy(update={"student": student, "outputs": outputs})


def rank(one: Try, headline: str, metrics: dict[str, Metric]) -> list[float]:
    """Lower is better: by the headline metric; ties by the other metrics, in their order."""
    ordered = [headline, *(name for name in one.validation if name != headline)]
    return [-metrics[name].sign * one.validation[name] for name in ordered]


def sha256_of_tuned(config: Config) -> str:
    """Of everything in a config that a try depends on: not what the best try filled in, nor where
    and for how many seeds the config runs."""
    ignored = (*NOT_TUNED, *PER_RUN)
    kept = {k: v for k, v in config.model_dump(mode="json").items() if k not in ignored}
    kept["teacher"].pop("seed")
    for name, recipe in config.recipes.items():
        kept["recipes"][name] = untuned(config, name, recipe).model_dump(mode="json")
        kept["recipes"][name]["student"].pop("seeds")
    tune = config.tune and config.tune.model_dump(mode="json")
    return sha256_of_json({**kept, "tune": tune})


def tuned_for(config: Config) -> bool:
    """Whether the tries were made with this config, and not with another version of it."""
    return config.tuned is not None and config.tuned.config == sha256_of_tuned(config)
