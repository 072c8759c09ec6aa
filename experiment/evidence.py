"""Evidence in the students of a run: a watermark that they carry, a teacher that they resemble."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configs.files import say
from configs.schema import LabError
from experiment.experiment import open_model, teacher_task
from experiment.plan import TEACHERS, Plan
from experiment.run import Run
from measure.defence import Setting, defence, setting_of
from measure.evaluate import BATCH_ROWS, TeacherReference
from measure.metrics import DIVERGENCE
from measure.provenance import ALPHA, FEWEST, accusations, closeness
from measure.watermark import Evidence, Found, other_keys
from models.generate import answers_of
from models.language import Forward, logits_at
from models.rows import Rows, collate
from models.vocabulary import require_same_vocabulary
from tasks import load_task
from tasks.task import Task
from teacher.access import ACCESS
from teacher.watermark import Served, Watermark, read_key

SPLIT = "heldout"


def models_of(run: Run) -> Iterator[tuple[str, int, torch.nn.Module]]:
    """(name, seed, model) of every student and of every control that is one."""
    plan = Plan(run.config())
    for name in plan.evaluated:
        if name not in TEACHERS:
            for seed in plan.seeds_of(name):
                yield name, seed, open_model(run, plan.stage(name, seed))


# -- a watermark -----------------------------------------------------------------------------------


def radioactivity(run: Run, owners: list[Path], key_file: Path | None, tokens: int) -> int:
    """Let every student write, and look for the watermark in its text (Sander et al. 2024, arXiv
    2402.14904). owners: the run with the weights of the teacher, if this one has none."""
    config = run.config()
    owned = Run.finished(owners[0]) if owners else run
    if owned.config().sold_elsewhere:
        raise LabError(
            "what would the teacher have written without the mark? Name the run that has its "
            "weights: --candidates RUN"
        )
    api = config.teacher.api
    key = read_key(key_file).key if key_file else api and api.watermark_key
    if not key:
        raise LabError("whose watermark? Name the key: --radioactivity --key FILE")
    task = load_task(config.task)
    theirs = teacher_task(owned.config(), owned, load_task(owned.config().task))
    require_same_vocabulary(theirs.tokenizer, task.tokenizer, "--radioactivity")
    owner, rows, keys = open_model(owned, "teacher"), task.rows(SPLIT), other_keys()
    say(f"{'student':<24}{'seed':>5}{'tokens':>10}{'z':>9}  p")
    found: dict[str, list[Found]] = {}
    for name, seed, model in models_of(run):
        text = written(model, task, rows, tokens, seed)
        one = evidence_of(text, owner, task).test(key, keys)
        found.setdefault(name, []).append(one)
        say(f"{name:<24}{seed:>5}{one.tokens:>10,}{one.z:>9.2f}  {shown(one.p, len(keys))}")
    say(meaning_of_mark(found))
    return 0


def written(model: Forward, task: Task, rows: Rows, tokens: int, seed: int) -> Rows:
    """What a model writes after the prompts of these rows, at temperature 1, until it has written
    so many tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids, prompts, answers, count = [], [], [], 0
    while count < tokens:
        for i, answer in answers_of(
            model, rows, BATCH_ROWS, longest=task.longest_answer, end=task.end, temperature=1.0,
            generator=generator, vocabulary=task.vocabulary,
        ):  # fmt: skip
            if count < tokens:
                ids.append(len(ids))
                prompts.append(rows.prompt(i).tolist())
                answers.append(answer.tokens.tolist()[: tokens - count])
                count += len(answers[-1])
    return Rows.build(ids, prompts, answers)


@torch.no_grad()
def evidence_of(text: Rows, owner: Forward, task: Task) -> Evidence:
    """What a text has more of than its owner's unmarked model would write."""
    found = Evidence(task.vocabulary)
    for start in range(0, len(text), BATCH_ROWS):
        batch = collate(text, np.arange(start, min(start + BATCH_ROWS, len(text))), task.pad)
        logits = logits_at(owner(batch.input_ids, use_cache=False), batch, task.vocabulary)
        found.add(batch.input_ids[batch.counted], batch.targets, logits.softmax(-1))
    return found


def shown(p: float, keys: int) -> str:
    return f"< {2 / (keys + 1):.2g}" if p <= 1 / (keys + 1) else f"{p:.2g}"


def meaning_of_mark(found: dict[str, list[Found]]) -> str:
    carries = [name for name, seeds in found.items() if all(one.p <= 0.01 for one in seeds)]
    if not carries:
        return (
            "\nNo student writes more green tokens of this key than of other keys. That does not "
            "show that none learned from marked answers: few of them, other training afterwards, "
            "or text changed on purpose leave no trace."
        )
    return (
        f"\n{', '.join(carries)}: with all seeds, the text has more green tokens of this key than "
        "with other keys, beyond what the unmarked teacher writes. So the student, or text that it "
        "learned from, goes back to answers with this mark; not how they were come by, nor by "
        "whom. If the key was committed to before, it was not chosen to fit."
    )


# -- a defence -------------------------------------------------------------------------------------

MARKED_TOKENS = 5_600  # that each student writes


def studies_of_defence(
    result: dict[str, Any], run: Run, reference: TeacherReference
) -> dict[str, Any]:
    """{"defence": what defended answers are worth to customers and to extractors}, if the run has
    bought some."""
    config, task = run.config(), reference.task
    key = config.teacher.api and config.teacher.api.watermark_key
    bought = [r for r in config.recipes.values() if r.sequences == "teacher"]
    settings = {setting_of(recipe.model_dump(mode="json")) for recipe in bought}
    if not key or len(settings) < 2:
        return {}
    owner = reference.teacher
    prices: dict[Setting, dict[str, float]] = {}
    for bias, temperature in sorted(settings):
        mark = Watermark(key, task.vocabulary, bias) if bias else None
        served = Served(owner, mark, temperature or 1.0)
        found = reference.metrics([reference.evaluate(served)], is_one_model=True)
        prices[bias, temperature] = {
            name: found[group][name].mean
            for group, name in (("quality", task.headline), ("fidelity", DIVERGENCE))
        }
    marks: dict[str, list[float]] = {}
    for name, seed, model in models_of(run):
        text = written(model, task, reference.rows, MARKED_TOKENS, seed)
        marks.setdefault(name, []).append(round(evidence_of(text, owner, task).z(key), 3))
    found = defence(result, prices, marks)
    return {"defence": found | {"z": marks}} if found else {}


# -- a teacher -------------------------------------------------------------------------------------


def provenance(run: Run, others: list[Path], count: int) -> int:
    """Which teacher is each student nearer to than innocent students are?"""
    runs, task = [run, *map(Run.finished, others)], load_task(run.config().task)
    candidates, rows = candidates_of(runs, task), task.rows(SPLIT)
    innocent = innocent_of(runs, candidates, task, rows)[: max(FEWEST, count)]
    if len(innocent) < max(FEWEST, count):
        raise LabError(
            f"{len(innocent)} innocent students in these runs, {max(FEWEST, count)} are needed; "
            "train more, as with controls=[baseline] and more seeds"
        )
    say(f"{'student':<24}{'candidate':<20}{'t':>8}  p")
    verdicts: dict[str, list[set[str]]] = {}
    for name, _, model in models_of(run):
        if name in run.config().recipes:
            found = accusations(closeness(candidates, model, task, rows), innocent)
            verdicts.setdefault(name, []).append({a.candidate for a in found if a.holds})
            for a in found:
                say(f"{name:<24}{a.candidate:<20}{a.t:>8.1f}  {a.p:.2g}")
    say(meaning_of_closeness(verdicts, len(innocent)))
    return 0


def candidates_of(runs: list[Run], task: Task) -> dict[str, Forward]:
    """{name: a teacher that may have taught a student}: those of the runs. LabError for fewer than
    two, or other tokens."""
    found: dict[str, Forward] = {}
    for run in runs:
        theirs = load_task(run.config().task)
        require_same_vocabulary(theirs.tokenizer, task.tokenizer, f"the teacher of {run.folder}")
        found[run.config().name] = open_model(run, "teacher")
    if "second_teacher" in runs[0].config().controls:
        found["second_teacher"] = open_model(runs[0], "second_teacher")
    if len(found) < 2:
        raise LabError("a second teacher is needed to compare with; name its run: --candidates RUN")
    return found


def innocent_of(
    runs: list[Run], candidates: dict[str, Forward], task: Task, rows: Rows
) -> list[dict[str, float]]:
    """The closeness of all students that learned from no teacher."""
    found = []
    for run in runs:
        recipes = Plan(run.config()).recipes
        for name, _, model in models_of(run):
            if not ACCESS[recipes[name].access].teacher:
                found.append(closeness(candidates, model, task, rows))
    return found


def meaning_of_closeness(verdicts: dict[str, list[set[str]]], controls: int) -> str:
    lines = []
    for name, seeds in verdicts.items():
        common = set.intersection(*seeds)
        what = (
            f"nearer to {', '.join(sorted(common))} than chance among {controls} innocent students"
            if common
            else "not nearer to one of them than chance"
        )
        lines.append(f"{name}: {what} (p <= {ALPHA:g} with all seeds).")
    return (
        "\n"
        + "\n".join(lines)
        + (
            "\nNearer is not taken: a student of a third model that learned from the same outputs "
            "would look alike, and if the innocent students' text contains them, this says nothing."
        )
    )
