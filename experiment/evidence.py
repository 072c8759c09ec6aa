"""Evidence in the students of a run: a watermark in their text, or closeness to a teacher."""

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import norm

from configs.files import read_text, say
from configs.schema import LabError
from experiment.experiment import open_experiment, open_model, teacher_of, teacher_task
from experiment.plan import Plan
from experiment.run import Run
from measure.defence import Setting, defence, setting_of
from measure.evaluate import BATCH_ROWS, TeacherReference, completion_logits
from measure.metrics import DIVERGENCE
from measure.provenance import (
    ALPHA,
    FEWEST,
    accusations,
    closeness,
    closeness_by_scores,
    closeness_by_text,
    holm,
)
from measure.stealing import as_shown, dimensions, singular_values
from measure.watermark import KEYS, Evidence, WatermarkTest, other_keys, watermark_tests
from models.generate import answers_of
from models.language import Forward
from models.rows import Rows, collate
from models.vocabulary import first_differing_id, require_same_vocabulary
from tasks import load_task
from tasks.task import Task
from teacher.api.store import Store
from teacher.watermark import KeyFile, Served, Watermark, key_of_account, read_key

SPLIT = "heldout"
COMPARED_TOKENS = 20_000  # written by each candidate or student, where weights are not known
MARKED_TOKENS = 5_600  # that each student writes in a study of defences


def models_of(run: Run, taught: bool | None = None) -> Iterator[tuple[str, int, torch.nn.Module]]:
    """(name, seed, model) of every student and of every control that is one; taught: only of those
    that learned from a teacher, or only of others."""
    plan = Plan(run.config())
    for name in plan.recipes:
        if taught in (None, plan.is_taught(name)):
            for seed in plan.seeds_of(name):
                yield name, seed, open_model(run, plan.stage(name, seed))


# -- a watermark -----------------------------------------------------------------------------------


def radioactivity(
    run: Run,
    owners: list[Path],
    key_file: Path | None,
    database: Path | None,
    tokens: int,
    text: Path | None = None,
) -> int:
    """Let every student write, and test its text for the watermark (Sander et al. 2024, arXiv
    2402.14904). owners: the run with the weights of the teacher, if this one has none. database:
    of a server that marked the answers to each account with a key of its own. text: a file that is
    tested instead, of whoever wrote it."""
    if len(owners) > 1:
        raise LabError("--radioactivity compares with one teacher; name one run in --candidates")
    owned = Run.finished(owners[0]) if owners else run
    if owned.config().sold_elsewhere:
        raise LabError(
            "the unmarked teacher is needed for comparison; name the run that has its weights: "
            "--candidates RUN"
        )
    key = key_of(run, key_file)
    if not key:
        raise LabError("the key of the watermark is needed: --radioactivity --key FILE")
    owners_task = teacher_task(owned.config(), owned, load_task(owned.config().task))
    owner = open_model(owned, "teacher")
    found_texts = (
        [(text.name, rows_of([read_text(text)], owners_task))]
        if text
        else texts_of_students(run, owners_task, tokens)
    )
    texts: dict[str, Evidence] = {}
    for name, found in found_texts:
        evidence = texts.setdefault(name, Evidence(owners_task.vocabulary))
        add_evidence(evidence, found, owner, owners_task)
    if database:
        return print_accounts(texts, key, database)
    found = watermark_tests(texts, key.key, other_keys())
    corrected = corrected_for_all(found)
    say(f"{'student':<24}{'tokens':>10}{'z':>9}  {'p, by rank':>12}  {'p, normal':>12}")
    for name, one in found.items():
        numbers = f"{one.tokens:>10,}{one.z:>9.2f}  {one.p_rank:>12.2g}  {corrected[name]:>12.2g}"
        say(f"{name:<24}{numbers}")
    say(meaning_of_mark([name for name, p in corrected.items() if shows(found[name], p)]))
    return 0


def key_of(run: Run, key_file: Path | None) -> KeyFile | None:
    """The key in a file, or else that of the run's own server."""
    if key_file:
        return read_key(key_file)
    api = run.config().teacher.api
    if not (api and api.watermark_key):
        return None
    return KeyFile(key=api.watermark_key, salt=run.config().name)


def shows(test: WatermarkTest, p: float) -> bool:
    """Whether a text carries the mark: p is that of the normal distribution, corrected; in a text
    that repeats a few pairs its tail is wrong, and some other keys would give as much."""
    return p <= ALPHA and test.p_rank <= 1 / (1 + KEYS)


def texts_of_students(run: Run, owners_task: Task, tokens: int) -> Iterator[tuple[str, Rows]]:
    """(name, what a student of this recipe writes), in the tokens of the owner's task."""
    task = load_task(run.config().task)
    other = first_differing_id(owners_task.tokenizer, task.tokenizer) is not None
    for name, seed, model in models_of(run):
        text = written(model, task, task.rows(SPLIT), tokens, seed)
        if other:
            answers = [task.render(text.completion(i).tolist()) for i in range(len(text))]
            text = rows_of(answers, owners_task)
        yield name, text


def rows_of(texts: list[str], task: Task) -> Rows:
    """Texts that somebody else wrote, as the owner's model reads them, in pieces whose first token
    is given. LabError for a task that does not continue texts, or if there is nothing to read."""
    if not task.continues_text:
        raise LabError(
            f"task {task.name} has other tokens, and cannot read a text of somebody else"
        )
    room, pieces = task.longest_row - 1, []
    for text in texts:
        tokens = task.encode_answer(text)
        pieces += [tokens[start : start + room] for start in range(0, len(tokens), room)]
    pieces = [piece for piece in pieces if len(piece) > 1]
    if not pieces:
        raise LabError("the text has no two tokens in a row")
    start = task.tokenizer.bos_token_id
    prompts = [[start, piece[0]] for piece in pieces]
    return Rows.build([*range(len(pieces))], prompts, [piece[1:] for piece in pieces])


def corrected_for_all(found: dict[str, WatermarkTest]) -> dict[str, float]:
    """{student: p of the normal tail, corrected for the number of students (Holm)}."""
    return dict(zip(found, holm([one.p_normal for one in found.values()]), strict=True))


def print_accounts(texts: dict[str, Evidence], key: KeyFile, database: Path) -> int:
    """The account whose key fits the text of each student best, corrected for their number."""
    if not database.is_file():
        raise LabError(f"no database {database}")
    with closing(Store(database)) as store:
        accounts = [row["id"] for row in store.accounts()]
    say(f"{'student':<24}{'account':<16}{'z':>9}  {'p, of all accounts':>20}")
    for name, text in texts.items():
        zs = {account: text.z(key_of_account(key, account)) for account in accounts}
        account = max(zs, key=zs.get)
        p = min(1.0, len(accounts) * float(norm.sf(zs[account])))
        say(f"{name:<24}{account:<16}{zs[account]:>9.2f}  {p:>20.2g}")
    return 0


def require_same_tokens(run: Run, task: Task) -> None:
    """LabError if a run's teacher has other tokens than a task."""
    config = run.config()
    theirs = teacher_task(config, run, load_task(config.task))
    require_same_vocabulary(theirs.tokenizer, task.tokenizer, f"the teacher of {run.folder}")


def written(model: Forward, task: Task, rows: Rows, tokens: int, seed: int) -> Rows:
    """This many tokens that a model writes after the prompts of rows, at temperature 1."""
    generator = torch.Generator().manual_seed(seed)
    ids, prompts, answers, count = [], [], [], 0
    while count < tokens:
        for i, answer in answers_of(
            model, rows, BATCH_ROWS, longest=task.longest_answer, end=task.end, temperature=1.0,
            generator=generator, vocabulary=task.vocabulary,
        ):  # fmt: skip
            ids.append(len(ids))
            prompts.append(rows.prompt(i).tolist())
            answers.append(answer.tokens.tolist()[: tokens - count])
            count += len(answers[-1])
            if count == tokens:
                break
    return Rows.build(ids, prompts, answers)


@torch.no_grad()
def add_evidence(found: Evidence, text: Rows, owner: Forward, task: Task) -> Evidence:
    """Add the completions of a text to the evidence."""
    for start in range(0, len(text), BATCH_ROWS):
        indices = np.arange(start, min(start + BATCH_ROWS, len(text)))
        batch = collate(text, indices, task.pad)
        logits = completion_logits(owner, task, text, indices)[0].cpu()
        found.add(batch.input_ids[batch.counted], batch.targets, logits.softmax(-1))
    return found


def meaning_of_mark(carrying: list[str]) -> str:
    if not carrying:
        return (
            "\nNo text has more green tokens of this key than chance explains. That does not show "
            "that nobody learned from marked answers: too few of these, later training on other "
            "text, or paraphrases leave no trace."
        )
    return (
        f"\nThe text of {', '.join(carrying)} has more green tokens of this key than chance and "
        f"the unmarked teacher explain (p <= {ALPHA:g}, corrected for all texts; none of {KEYS} "
        "other keys gives as much). Who wrote it, or text that the writer learned from, derives "
        "from answers with this mark. This does not show who "
        "collected them, or how; and it assumes that the key was drawn before, as a published "
        "commitment shows (python -m teacher.api key FILE)."
    )


# -- a defence -------------------------------------------------------------------------------------


def studies_of_defence(
    result: dict[str, Any], run: Run, reference: TeacherReference
) -> dict[str, Any]:
    """{"defence": what defended answers are worth to customers and to extractors}, if the run has
    some."""
    config, task, key = run.config(), reference.task, None
    recipes = {
        setting_of(recipe.model_dump(mode="json")): recipe
        for recipe in config.recipes.values()
        if recipe.sequences == "teacher" and recipe.teachers == ["teacher"]
    }
    if not any(s.bias or s.antidistillation for s in recipes) or len(recipes) < 2:
        return {}
    if config.teacher.api:
        key = config.teacher.api.watermark_key
    experiment = open_experiment(config, run)
    prices: dict[Setting, dict[str, float]] = {}
    for setting, recipe in sorted(recipes.items()):
        owner = teacher_of(experiment, recipe, counted=lambda model: model)
        mark = Watermark(key, task.vocabulary, setting.bias) if setting.bias else None
        values = price(reference, owner, mark, setting)
        if setting.share < 1:
            plain = price(reference, owner, None, setting)
            values = {
                name: setting.share * value + (1 - setting.share) * plain[name]
                for name, value in values.items()
            }
        prices[setting] = values
    marks: dict[str, list[float]] = {}
    owner = getattr(reference.teacher, "model", reference.teacher)  # without counting FLOPs
    for name, seed, model in models_of(run) if key else ():
        text = written(model, task, reference.rows, MARKED_TOKENS, seed)
        z = add_evidence(Evidence(task.vocabulary), text, owner, task).z(key)
        marks.setdefault(name, []).append(round(z, 3))
    found = defence(result, prices, marks)
    if not found:
        return {}
    return {"defence": found | {"z": marks, "stealing": stealing(owner, task, reference.rows)}}


def price(
    reference: TeacherReference, owner: Forward, mark: Watermark | None, setting: Setting
) -> dict[str, float]:
    """What answers are like that are served so, by metric."""
    served = Served(owner, mark, setting.temperature or 1.0)
    found = reference.metrics([reference.evaluate(served)], is_one_model=True)
    return {
        name: found[group][name].mean
        for group, name in (("quality", reference.task.headline), ("fidelity", DIVERGENCE))
    }


def stealing(owner: Forward, task: Task, rows: Rows) -> dict[str, Any]:
    """{"size": the teacher's hidden size, "shown": {how: {"size": that was found or None,
    "singular_values": [...]}}}."""
    size = owner.config.hidden_size
    asked = np.arange(min(len(rows), 2 * size))
    logits, _, counts = completion_logits(owner, task, rows, asked)
    first = np.cumsum([0, *counts[:-1]])  # of each answer
    known = as_shown(logits[first].double().cpu().numpy())
    return {
        "size": size,
        "shown": {
            how: {"size": dimensions(found), "singular_values": [
                float(f"{value:.4g}") for value in singular_values(found)
            ]}
            for how, found in known.items()
        },
    }  # fmt: skip


# -- a teacher -------------------------------------------------------------------------------------


def provenance(run: Run, others: list[Path], count: int, reach: str) -> int:
    """Which teacher is each student closer to than innocent students are? reach: what is known of
    the students."""
    runs, task = [run, *map(Run.finished, others)], load_task(run.config().task)
    rows = task.rows(SPLIT)
    measured = measure_of(reach, candidates_of(runs, task), task, rows, COMPARED_TOKENS)
    innocent, kind = innocent_of(runs, measured)
    needed = max(FEWEST, count)
    if len(innocent) < needed:
        raise LabError(
            f"{len(innocent)} different innocent students in these runs, {needed} are needed; "
            "train more, as with controls=[baseline] and more seeds"
        )
    say(f"innocent: {len(innocent)} x {kind}")
    say(f"{'student':<24}{'candidate':<20}{'t':>8}  p")
    verdicts: dict[str, list[set[str]]] = {}
    for name, _, model in models_of(run, taught=True):
        if name in run.config().recipes:
            found = accusations(measured(model), innocent)
            verdicts.setdefault(name, []).append({a.candidate for a in found if a.holds})
            for a in found:
                say(f"{name:<24}{a.candidate:<20}{a.t:>8.1f}  {a.p:.2g}")
    say(meaning_of_closeness(verdicts, len(innocent)))
    return 0


def candidates_of(runs: list[Run], task: Task) -> dict[str, Forward]:
    """{name: a teacher that may have taught a student}: those of the runs whose weights are known.
    LabError for fewer than two, or for other tokens."""
    found: dict[str, Forward] = {}
    for run in runs:
        if run.config().sold_elsewhere:
            continue
        require_same_tokens(run, task)
        name = run.config().name
        found[name if name not in found else str(run.folder)] = open_model(run, "teacher")
    if "second_teacher" in runs[0].config().controls:
        found["second_teacher"] = open_model(runs[0], "second_teacher")
    if len(found) < 2:
        raise LabError("a second teacher is needed for comparison; name its run: --candidates RUN")
    return found


Measure = Callable[[Forward], dict[str, float]]  # a student -> its closeness to each candidate


def measure_of(
    reach: str, candidates: dict[str, Forward], task: Task, rows: Rows, tokens: int
) -> Measure:
    """rows: what candidates and students are compared on; where weights are not known, they or the
    student write this many tokens after the prompts of these."""
    if reach == "weights":
        return lambda student: closeness(candidates, student, task, rows)
    if reach == "scores":
        samples = {
            name: written(model, task, rows, tokens, seed=0) for name, model in candidates.items()
        }
        return lambda student: closeness_by_scores(student, task, samples)
    return lambda student: closeness_by_text(
        candidates, task, written(student, task, rows, tokens, seed=0)
    )


def innocent_of(runs: list[Run], measured: Measure) -> tuple[list[dict[str, float]], str]:
    """(closeness of the students that learned from no teacher, what kind they are): the kind with
    most different models of the first run's architecture. Equal models count once."""
    shape = runs[0].config().students.model
    by_kind: dict[str, dict[str, dict[str, float]]] = {}
    for run in runs:
        config, plan = run.config(), Plan(run.config())
        for name, seed, model in models_of(run, taught=False):
            if config.model_of(plan.recipes[name]) != shape:
                continue
            sha256 = run.manifest["stages"][plan.stage(name, seed)]["sha256"]
            kind = by_kind.setdefault(name, {})
            if sha256 not in kind:
                kind[sha256] = measured(model)
    kind = max(by_kind, key=lambda name: len(by_kind[name]), default="baseline")
    return [*by_kind.get(kind, {}).values()], kind


def meaning_of_closeness(verdicts: dict[str, list[set[str]]], controls: int) -> str:
    lines = []
    for name, seeds in verdicts.items():
        common = set.intersection(*seeds)
        what = (
            f"closer to {', '.join(sorted(common))} than {controls} innocent students predict"
            if common
            else "no closer to one of them than innocent students predict"
        )
        lines.append(f"{name}: {what} (p <= {ALPHA:g} with all seeds).")
    return (
        "\n"
        + "\n".join(lines)
        + (
            "\nCloseness does not show how outputs were obtained: a student of a third model that "
            "learned from the same outputs would be as close, and if the innocent students' text "
            "contains such outputs, the test is not valid."
        )
    )
