"""Which accounts' answers has a student learned? Answers that an account was sent are compared with
others to the same prompts that were never sent. A student that saw neither finds both equally
likely, so that the tests are exact."""

import queue
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from configs.files import say
from configs.schema import LabError
from experiment.evidence import models_of, require_same_tokens
from experiment.experiment import open_model
from experiment.run import Run
from measure.evaluate import BATCH_ROWS
from measure.provenance import likelihood, sent_or_kept
from measure.usage import text_of
from models.generate import answers_of
from models.language import Forward
from models.rows import Rows
from tasks import load_task
from tasks.task import Task
from teacher.api.defence import Defence
from teacher.api.engine import Engine, Job
from teacher.api.store import Store
from teacher.watermark import read_key

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
    api = run.config().teacher.api
    key = read_key(key_file).key if key_file else api and api.watermark_key
    with closing(Store(database)) as store:
        found = answers_by_account(store, open_model(owned, "teacher"), task, key)
    if not found:
        raise LabError(
            f"{database} has no account with sampled answers, or canaries of a known key; greedy "
            "answers are equal for all"
        )
    say(f"{'student':<28}{'test':<18}{'account':<16}{'answers':>8}  {'p, of all accounts':>20}")
    for name, seed, model in models_of(run):
        for test, accounts in found.items():
            ps = {account: sent.p(model, task) for account, sent in accounts.items()}
            account = min(ps, key=ps.get)
            p, count = min(1.0, len(ps) * ps[account]), len(accounts[account].sent)
            student = f"{name}, seed {seed}"
            say(f"{student:<28}{test:<18}{account:<16}{count:>8,}  {p:>20.2g}")
    say(
        "\nA small p shows that the student has learned answers that this account was sent, or "
        "text that contains them."
    )
    return 0


def answers_by_account(
    store: Store, owner: Forward, task: Task, key: int | None
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


def sampled(account: str, store: Store, owner: Forward, task: Task) -> Sent | None:
    """The sampled answers of an account at the temperature of its first, and others. For answers
    with a watermark the test is conservative: the others have none."""
    rows = store.sampled(account, MOST_SENT)
    temperature = (rows[0]["temperature"] if rows else None) or 1.0
    rows = [row for row in rows if (row["temperature"] or 1.0) == temperature]
    prompts, sent, longest = [], [], []
    for row in rows:
        try:
            prompt = task.prompt(text_of(row["prompt"]))
            answer = tokens_of(task, row["answer"], row["finish_reason"] == "stop")
        except LabError:
            continue
        prompts.append(prompt)
        sent.append(answer)
        longest.append(row["max_tokens"])
    if not prompts:
        return None
    asked = Rows.build([*range(len(prompts))], prompts, [[] for _ in prompts])
    kept = [made(owner, task, asked, longest, temperature, n) for n in range(KEPT)]
    return Sent.of(task, prompts, sent, kept)


def canaries(
    account: str, store: Store, engine: Engine, task: Task, defence: Defence
) -> Sent | None:
    """The canary answers of an account, and those that it would have been sent with the other
    choice of the key: both are drawn again."""
    prompts, longest, seeds = [], [], []
    for row in store.canaries(account, MOST_SENT):
        try:
            prompts.append(task.prompt(text_of(row["prompt"])))
        except LabError:
            continue
        longest.append(row["max_tokens"])
        seeds.append(defence.canary(account, row["prompt"]))
    sent, kept = (
        drawn_again(engine, task, prompts, longest, [s[n] for s in seeds]) for n in (0, 1)
    )
    return Sent.of(task, prompts, sent, [kept])


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
