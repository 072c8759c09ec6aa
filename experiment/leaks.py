"""Which accounts' answers has a student learned? Dataset inference with an exact test: answers that
were sampled for an account are compared with others to the same prompts that were never sent. For
answers with a watermark the test is conservative: the others have none."""

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
from teacher.api.store import Store

KEPT = 4  # answers that are made for each that was sent, and kept
MOST_SENT = 500  # answers of an account that are compared


@dataclass(frozen=True)
class Sent:
    """Answers that an account was sent, and others to the same prompts that were made in the same
    way and kept: one Rows each, with equal prompts."""

    sent: Rows
    kept: list[Rows]

    def p(self, student: Forward, task: Task) -> float:
        others = np.stack([likelihood(student, task, one) for one in self.kept], axis=1)
        return sent_or_kept(likelihood(student, task, self.sent), others)


def leaks(run: Run, owners: list[Path], database: Path) -> int:
    """Which accounts' answers has each student learned? Exact: answers that were sampled for an
    account are compared with others to the same prompts that were never sent."""
    if not database.is_file():
        raise LabError(f"no database {database}")
    owned, task = Run.finished(owners[0]) if owners else run, load_task(run.config().task)
    if owned.config().sold_elsewhere:
        raise LabError("other answers of the teacher are needed; name its run: --candidates RUN")
    require_same_tokens(owned, task)
    owner, accounts = open_model(owned, "teacher"), {}
    with closing(Store(database)) as store:
        for account in [row["id"] for row in store.accounts()]:
            found = sent_to(account, store, owner, task)
            if found:
                accounts[account] = found
    if not accounts:
        raise LabError(
            f"{database} has no account with sampled answers; greedy answers are equal for all"
        )
    say(f"{'student':<28}{'account':<16}{'answers':>9}  {'p, of all accounts':>20}")
    for name, seed, model in models_of(run):
        ps = {account: found.p(model, task) for account, found in accounts.items()}
        account = min(ps, key=ps.get)
        p = min(1.0, len(ps) * ps[account])
        count = len(accounts[account].sent)
        say(f"{f'{name}, seed {seed}':<28}{account:<16}{count:>9,}  {p:>20.2g}")
    say(
        "\nA small p shows that the student has learned answers that this account was sent, or "
        "text that contains them."
    )
    return 0


def sent_to(account: str, store: Store, owner: Forward, task: Task) -> Sent | None:
    """The sampled answers of an account at the temperature of its first; None without any."""
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
    # a row is compared if all its answers fit
    fits = [
        i for i, prompt in enumerate(prompts)
        if all(0 < len(one[i]) <= task.longest_row - len(prompt) for one in (sent, *kept))
    ]  # fmt: skip
    if not fits:
        return None

    def rows_of(answers: list[list[int]]) -> Rows:
        return Rows.build(fits, [prompts[i] for i in fits], [answers[i] for i in fits])

    return Sent(rows_of(sent), [rows_of(one) for one in kept])


def made(
    owner: Forward, task: Task, asked: Rows, longest: list[int], temperature: float, seed: int
) -> list[list[int]]:
    """Answers of the teacher to these prompts, cut and read as those that were sent."""
    generator, answers = torch.Generator().manual_seed(seed), [[]] * len(asked)
    for i, answer in answers_of(
        owner, asked, BATCH_ROWS, longest=max(longest), end=task.end, temperature=temperature,
        generator=generator, vocabulary=task.vocabulary,
    ):  # fmt: skip
        tokens = answer.tokens.tolist()[: longest[i]]
        try:
            answers[i] = tokens_of(task, task.render(tokens), tokens[-1] == task.end)
        except LabError:
            answers[i] = []
    return answers


def tokens_of(task: Task, text: str, ended: bool) -> list[int]:
    """LabError for a text that the task cannot read."""
    return [*task.encode_answer(text), *[task.end] * ended]
