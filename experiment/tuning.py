"""Equal effort: tune every recipe and control with the same number of tries.

A try is a student of an ordinary run, NAME-tuning-1: trained at the full budget from a seed that is
not judged, and evaluated on the validation split alone. What needs the outcome of others (a control
made from the first recipe's outputs, a student of an assistant) is tried in a later run.
"""

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from configs.files import read_text, say, write_atomically
from configs.schema import Config, LabError, Recipe, Try, Tuned
from experiment.bought import evaluated_rows
from experiment.command import command_line
from experiment.experiment import open_model, open_task, require_same_rows
from experiment.plan import TEACHERS, Plan, needed_by
from experiment.reading import check_config, config_file, read_config
from experiment.result import teacher_references
from experiment.run import Run
from experiment.tries import NOT_TUNED, rank, sha256_of_tuned, tries_of
from measure.metrics import metrics_of
from tasks import TASKS

COSTS = ("flops", "seconds", "joules", "money")


def tune(
    path: str, overrides: list[str], runs: Path, train: Callable[[Config, Path], None]
) -> None:
    """Try, and write the section `tuned` at the end of the config. train: (config, run folder).
    Overrides may change how it runs on this machine, not what is tuned."""
    path = config_file(path)
    config = read_config(path, overrides, without=("tuned",))
    if sha256_of_tuned(config) != sha256_of_tuned(read_config(path, without=("tuned",))):
        raise LabError(
            f"--tune writes the best tries into {path}: make other changes there, not as "
            f"{overrides[0]}"
        )
    if config.tune is None:
        raise LabError(
            f"{path} has no section tune; add one, as in tune: {{learning_rate: [0.003, 0.006], "
            "seed: 90}}"
        )
    found: dict[str, list[Try]] = {}
    paid: dict[str, dict[str, Any]] = {}  # by stage: what later rounds copy is paid once
    for number in itertools.count(1):
        waiting = tunable(config, found)
        if not waiting:
            break
        tried = config_of_tries(config, waiting, found, number)
        train(tried, runs / tried.name)
        run = Run.finished(runs / tried.name)
        found |= judged(config, run, tried, waiting)
        paid |= {row["stage"]: row for row in run.ledger if row["stage"] not in TEACHERS}
    cost = {key: sum(row[key] for row in paid.values()) for key in COSTS}
    headline = TASKS[config.task.name].headline
    tuned = Tuned(metric=headline, config=sha256_of_tuned(config), tries=found, **cost)
    write_atomically(Path(path), with_section(read_text(Path(path)), tuned))
    for name, (best, *_) in found.items():
        values = best.model_dump(exclude={"validation"}, exclude_none=True)
        shown = ", ".join(f"{key} {value:g}" for key, value in values.items())
        say(f"{name:<20} {shown}: {headline} {best.validation[headline]:.4f}")
    say(f"the best tries are in force in {path}\nnext: {command_line('train.py', path)}")


def needs(config: Config, name: str, recipe: Recipe) -> list[str]:
    """The recipes that must be tuned before, in order: those that teach, the first for controls
    made from its outputs, and that whose entropy label smoothing uses."""
    control, softest = recipe.control, Plan(config).softest
    direct = [
        other
        for number, (other, its) in enumerate(config.recipes.items())
        if other in needed_by(recipe)
        or (number == 0 and name not in config.recipes and (control.shuffled or control.gold))
        or (control.smoothed and its is softest)
    ]
    before = [n for other in direct for n in needs(config, other, config.recipes[other])]
    return list(dict.fromkeys([*before, *direct]))


def tunable(config: Config, found: dict[str, list[Try]]) -> dict[str, Recipe]:
    """What is not tuned yet, and needs nothing that is not."""
    known = with_best(config, found)
    return {
        name: recipe
        for name, recipe in Plan(known).recipes.items()
        if name not in found and found.keys() >= {*needs(known, name, recipe)}
    }


def with_best(config: Config, found: dict[str, list[Try]]) -> Config:
    """The config with what was found so far."""
    recipes = {n: as_tried(r, found[n][0]) if n in found else r for n, r in config.recipes.items()}
    return config.model_copy(update={"recipes": recipes})


def as_tried(recipe: Recipe, one: Try) -> Recipe:
    student = recipe.student.model_copy(update={"learning_rate": one.learning_rate, "seeds": None})
    rows = one.transfer_rows or recipe.outputs.transfer_rows
    outputs = recipe.outputs.model_copy(update={"transfer_rows": rows})
    return recipe.model_copy(update={"student": student, "outputs": outputs})


def config_of_tries(
    config: Config, waiting: dict[str, Recipe], found: dict[str, list[Try]], number: int
) -> Config:
    """A config whose recipes are tries, after the tuned recipes that they need."""
    known = with_best(config, found)
    recipes = {
        need: known.recipes[need]
        for name, recipe in waiting.items()
        for need in needs(known, name, recipe)
    }
    for name, recipe in waiting.items():
        for place, one in enumerate(tries_of(config, name, recipe), start=1):
            recipes[try_name(name, place)] = as_tried(recipe, one)
    changes = {
        "name": f"{config.name}-tuning-{number}",
        "seeds": [config.tune.seed],
        "recipes": {name: recipe.model_dump(mode="json") for name, recipe in recipes.items()},
        "controls": [name for name in config.controls if name in TEACHERS],
    }
    removed = dict.fromkeys(NOT_TUNED, None) | {"verdicts": []}
    return check_config({**config.model_dump(mode="json"), **removed, **changes}, "tune")


def judged(
    config: Config, run: Run, tried: Config, waiting: dict[str, Recipe]
) -> dict[str, list[Try]]:
    """The tries with their metrics on the validation split, best first."""
    plan, task = Plan(tried), open_task(run, tried)
    require_same_rows(run, {"validation": task.rows("validation")})
    rows = {"validation": evaluated_rows(tried, task, "validation")}
    reference = teacher_references(tried, run, task, rows)[1]["validation"]
    metrics, found = metrics_of(task), {}
    for name, recipe in waiting.items():
        tries = []
        for place, one in enumerate(tries_of(config, name, recipe), start=1):
            model = open_model(run, plan.stage(try_name(name, place)))
            estimates = reference.metrics([reference.evaluate(model)])
            values = estimates["quality"] | estimates["fidelity"]
            shown = {k: float(f"{values[k].mean:.5g}") for k in task.table if k in values}
            tries.append(one.model_copy(update={"validation": shown}))
        found[name] = sorted(tries, key=lambda one: rank(one, task.headline, metrics))
    return found


def try_name(name: str, place: int) -> str:
    """The recipe of a try."""
    return f"{name}--{place}"


def with_section(text: str, tuned: Tuned) -> str:
    """The text of a config with this section `tuned`, a line per try, instead of the one it had."""
    before = re.split(r"^tuned:", text, maxsplit=1, flags=re.MULTILINE)[0].rstrip()
    head = yaml.safe_dump(tuned.model_dump(exclude={"tries"}), sort_keys=False)
    lines = ["", "tuned:", *(f"  {line}" for line in head.splitlines()), "  tries:"]
    for name, tries in tuned.tries.items():
        lines.append(f"    {name}:")
        for one in tries:
            values = one.model_dump(exclude_none=True)
            flow = yaml.safe_dump(values, default_flow_style=True, sort_keys=False, width=1000)
            lines.append(f"      - {flow.strip()}")
    return "\n".join([before, *lines, ""])
