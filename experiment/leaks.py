"""Which accounts' answers has a student learned? Answers that an account was sent are compared with
others to the same prompts that were never sent. A student that saw neither finds both equally
likely, so that the tests are exact."""

import queue
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from configs.files import say
from configs.schema import LabError
from experiment.evidence import key_of, models_of, require_same_tokens
from experiment.experiment import open_model
from experiment.run import Run
from measure.evaluate import BATCH_ROWS
from measure.provenance import ALPHA, holm, likelihood, sent_or_kept
from measure.usage import text_of
from models.generate import answers_of
from models.language import Forward
from models.rows import Rows
from tasks import load_task
from tasks.task import Task
from teacher.api.defence import Defence
from teacher.api.engine import Engine, Job
from teacher.api.store import Store
from teacher.watermark import KeyFile

KEPT = 4  # answers that are made for each that was sent, and kept
MOST_SENT = 500  # answers of an account that are compared
SAMPLED, CANARIES = "sampled answers", "canaries"


@dataclass(frozen=True)
class Sent:
    """Answers that an account was sent, and others to the same prompts that were made in the same
    way and kept: one Rows each, with equal prompts."""

    sent: Rows
    kept: list[Rows]

    @classmethod
    def of(
        cls,
        task: Task,
        prompts: list[list[int]],
        sent: list[list[int]],
        kept: list[list[list[int]]],
    ) -> "Sent | None":
        """Of the rows whose answers all fit, and differ; None without any."""
        fits = [
            i for i, prompt in enumerate(prompts)
            if all(0 < len(one[i]) <= task.longest_row - len(prompt) for one in (sent, *kept))
            and any(one[i] != sent[i] for one in kept)
        ]  # fmt: skip
        if not fits:
            return None

        def rows_of(answers: list[list[int]]) -> Rows:
            return Rows.build(fits, [prompts[i] for i in fits], [answers[i] for i in fits])

        return cls(rows_of(sent), [rows_of(one) for one in kept])

    def p(self, student: Forward, task: Task) -> float:
        others = np.stack([likelihood(student, task, one) for one in self.kept], axis=1)
        return sent_or_kept(likelihood(student, task, self.sent), others)


def leaks(run: Run, owners: list[Path], database: Path, key_file: Path | None = None) -> int:
    """The account whose answers each student has learned: by answers that were sampled, and by
    canaries, for which the owner's key is needed."""
    if not database.is_file():
        raise LabError(f"no database {database}")
    owned, task = Run.finished(owners[0]) if owners else run, load_task(run.config().task)
    if owned.config().sold_elsewhere:
        raise LabError("other answers of the teacher are needed; name its run: --candidates RUN")
    require_same_tokens(owned, task)
    with closing(Store(database)) as store:
        key = key_of(run, key_file)
        found = answers_by_account(store, open_model(owned, "teacher"), task, key)
    if not found:
        raise LabError(
            f"{database} has no account with sampled answers, or canaries of a known key; greedy "
            "answers are equal for all"
        )
    rows = [
        (f"{name}, seed {seed}", test, *likeliest(accounts, model, task))
        for name, seed, model in models_of(run)
        for test, accounts in found.items()
    ]
    corrected = holm([p for *_, p in rows])
    say(f"{'student':<28}{'test':<18}{'account':<16}{'answers':>8}  {'p, of all':>12}")
    for (student, test, account, _), p in zip(rows, corrected, strict=True):
        count = len(found[test][account].sent)
        say(f"{student:<28}{test:<18}{account:<16}{count:>8,}  {p:>12.2g}")
    say(
        f"\np <= {ALPHA:g}, corrected for all accounts, students and tests, shows that the student "
        "has learned answers that this account was sent, or text that contains them. Accounts that "
        "asked with the same seed were sent the same answers."
    )
    return 0


def likeliest(accounts: dict[str, Sent], student: Forward, task: Task) -> tuple[str, float]:
    """(the account with the smallest p, this p corrected for the number of accounts)."""
    ps = {account: sent.p(student, task) for account, sent in accounts.items()}
    account = min(ps, key=ps.get)
    return account, min(1.0, len(ps) * ps[account])


def answers_by_account(
    store: Store, owner: Forward, task: Task, key: KeyFile | None
) -> dict[str, dict[str, Sent]]:
    """{test: {account: its answers}} of the tests that have any."""
    found: dict[str, dict[str, Sent]] = {}
    with closing(Engine(owner, task)) as engine:
        for account in [row["id"] for row in store.accounts()]:
            tests = {SAMPLED: sampled(account, store, owner, task)}
            if key:
                tests[CANARIES] = canaries(account, store, engine, task, Defence(key, canaries=1))
            for test, sent in tests.items():
                if sent:
                    found.setdefault(test, {})[account] = sent
    return found


@dataclass(frozen=True)
class Asked:
    """What an account asked: different prompts, the answers as a student reads them, and how long
    they could be."""

    prompts: list[list[int]]
    answers: list[list[int]]
    longest: list[int]

    @classmethod
    def of(cls, rows: list[sqlite3.Row], task: Task) -> "Asked":
        """Without what the task cannot read."""
        found = cls([], [], [])
        for row in rows:
            try:
                prompt = task.prompt(text_of(row["prompt"]))
                answer = tokens_of(task, row["answer"], row["finish_reason"] == "stop")
            except LabError:
                continue
            if prompt not in found.prompts:
                found.prompts.append(prompt)
                found.answers.append(answer)
                found.longest.append(row["max_tokens"])
        return found


def sampled(account: str, store: Store, owner: Forward, task: Task) -> Sent | None:
    """The answers of an account that were sampled without a mark, at the temperature of the first,
    and others that were made in the same way."""
    rows = store.sampled(account, MOST_SENT)
    temperature = (rows[0]["temperature"] if rows else None) or 1.0
    asked = Asked.of([row for row in rows if (row["temperature"] or 1.0) == temperature], task)
    if not asked.prompts:
        return None
    prompts = Rows.build([*range(len(asked.prompts))], asked.prompts, [[]] * len(asked.prompts))
    kept = [made(owner, task, prompts, asked.longest, temperature, n) for n in range(KEPT)]
    return Sent.of(task, asked.prompts, asked.answers, kept)


def canaries(
    account: str, store: Store, engine: Engine, task: Task, defence: Defence
) -> Sent | None:
    """The canary answers of an account, and those that it would have been sent with the other
    choice of the key: both are drawn again. LabError if most of them are not what was sent."""
    asked = Asked.of(store.canaries(account, MOST_SENT), task)
    if not asked.prompts:
        return None
    seeds = [defence.canary(account, prompt) for prompt in asked.prompts]
    sent, kept = (
        drawn_again(engine, task, asked.prompts, asked.longest, [pair[n] for pair in seeds])
        for n in (0, 1)
    )
    same = [i for i, answer in enumerate(asked.answers) if answer == sent[i]]
    if len(same) < len(sent) / 2:
        raise LabError(
            f"{len(same)} of {len(sent)} canaries of {account} are what this teacher and this key "
            "give; name the run that was served with --candidates, and its key with --key"
        )
    return Sent.of(
        task,
        [asked.prompts[i] for i in same],
        [sent[i] for i in same],
        [[kept[i] for i in same]],
    )


def drawn_again(
    engine: Engine, task: Task, prompts: list[list[int]], longest: list[int], seeds: list[int]
) -> list[list[int]]:
    """Answers with these seeds, as a student's task reads their text."""
    ended: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def deliver(step: tuple | Exception | None) -> None:
        if not isinstance(step, tuple):
            ended.put(step)

    jobs = [
        Job(prompt, most, deliver, seed=seed)
        for prompt, most, seed in zip(prompts, longest, seeds, strict=True)
    ]
    for job in jobs:
        engine.submit(job)
    for error in [ended.get() for _ in jobs]:
        if error:
            raise error
    return readable(task, [job.tokens for job in jobs])


def made(
    owner: Forward, task: Task, asked: Rows, longest: list[int], temperature: float, seed: int
) -> list[list[int]]:
    """Answers of the teacher to these prompts, cut and read as those that were sent."""
    generator, answers = torch.Generator().manual_seed(seed), [[]] * len(asked)
    for i, answer in answers_of(
        owner, asked, BATCH_ROWS, longest=max(longest), end=task.end, temperature=temperature,
        generator=generator, vocabulary=task.vocabulary,
    ):  # fmt: skip
        answers[i] = answer.tokens.tolist()[: longest[i]]
    return readable(task, answers)


def readable(task: Task, answers: list[list[int]]) -> list[list[int]]:
    """The answers as a task reads their text; empty where it cannot."""
    found = []
    for tokens in answers:
        try:
            found.append(tokens_of(task, task.render(tokens), tokens[-1:] == [task.end]))
        except LabError:
            found.append([])
    return found


def tokens_of(task: Task, text: str, ended: bool) -> list[int]:
    """LabError for a text that the task cannot read."""
    return [*task.encode_answer(text), *[task.end] * ended]
