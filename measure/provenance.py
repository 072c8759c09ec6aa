"""Whether a student learned from a teacher that marks no answers.

Closeness: how much closer a student is to one candidate than to the others, compared with innocent
students. The unit is the training run: students that differ only in their seed are closer to one
teacher or another by chance, and more prompts do not reduce this.

Sent or kept: answers that an account was sent, compared with others that were drawn in the same way
and never sent. A model that saw neither finds both equally likely, so that the test is exact.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import t

from measure.evaluate import BATCH_ROWS, completion_logits
from measure.fidelity import Expectations, kl_teacher_student
from models.language import Forward
from models.rows import Rows
from tasks.task import Task

FEWEST = 8  # innocent students
ALPHA = 0.001  # an accusation


@dataclass(frozen=True)
class Accusation:
    """How many standard deviations a student is closer to a candidate than innocent students are
    (t), and p, corrected for the number of candidates (Holm 1979)."""

    candidate: str
    t: float
    p: float

    @property
    def holds(self) -> bool:
        return self.p <= ALPHA


@torch.no_grad()
def closeness(
    candidates: dict[str, Forward], student: Forward, task: Task, rows: Rows
) -> dict[str, float]:
    """{candidate: minus the mean of KL(candidate || student) over the positions of these rows}, in
    nats per token."""
    totals, positions = dict.fromkeys(candidates, 0.0), 0
    for indices in np.array_split(np.argsort(rows.lengths), -(-len(rows) // BATCH_ROWS)):
        logits, targets, counts = completion_logits(student, task, rows, indices)
        positions += sum(counts)
        for name, candidate in candidates.items():
            theirs = completion_logits(candidate, task, rows, indices)[0]
            totals[name] -= float(kl_teacher_student(Expectations(theirs, logits, targets)).sum())
    return {name: total / positions for name, total in totals.items()}


@torch.no_grad()
def likelihood(model: Forward, task: Task, rows: Rows) -> np.ndarray:
    """The log-probability of each completion, [rows] nats."""
    found = np.empty(len(rows))
    for indices in np.array_split(np.argsort(rows.lengths), -(-len(rows) // BATCH_ROWS)):
        logits, targets, counts = completion_logits(model, task, rows, indices)
        log_probs = torch.log_softmax(logits.double(), -1).gather(-1, targets[:, None])[:, 0]
        ends = np.cumsum(counts)[:-1]
        found[indices] = [part.sum() for part in np.split(log_probs.cpu().numpy(), ends)]
    return found


def closeness_by_scores(student: Forward, task: Task, samples: dict[str, Rows]) -> dict[str, float]:
    """{candidate: the student's mean log-probability of what the candidate writes}, in nats per
    token: for a student that only scores texts."""
    return {name: mean_per_token(student, task, rows) for name, rows in samples.items()}


def closeness_by_text(candidates: dict[str, Forward], task: Task, text: Rows) -> dict[str, float]:
    """{candidate: its mean log-probability of what the student writes}, in nats per token: for a
    student of which only answers are known."""
    return {name: mean_per_token(model, task, text) for name, model in candidates.items()}


def mean_per_token(model: Forward, task: Task, rows: Rows) -> float:
    tokens = (rows.lengths - rows.prompt_lengths).sum()
    return float(likelihood(model, task, rows).sum() / tokens)


def relative_closeness(values: dict[str, float]) -> dict[str, float]:
    """How much closer each candidate is than the others are on average: what all good students
    share cancels."""
    names = [*values]
    return {
        name: values[name] - float(np.mean([values[other] for other in names if other != name]))
        for name in names
    }


def accusations(
    student: dict[str, float], innocent: Sequence[dict[str, float]]
) -> list[Accusation]:
    """For each of two or more candidates: is the student closer than one more innocent student
    would be (a prediction interval by Student's t)? Each dict holds the closeness to every
    candidate."""
    found, controls = relative_closeness(student), [relative_closeness(one) for one in innocent]
    raw = {}
    for name, value in found.items():
        known = np.array([one[name] for one in controls])
        spread = known.std(ddof=1) * (1 + 1 / len(known)) ** 0.5
        statistic = (value - known.mean()) / spread
        raw[name] = (float(statistic), float(t.sf(statistic, len(known) - 1)))
    corrected = holm([p for _, p in raw.values()])
    return [
        Accusation(name, statistic, p)
        for (name, (statistic, _)), p in zip(raw.items(), corrected, strict=True)
    ]


def holm(ps: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979)."""
    order = np.argsort(ps)
    stepped = np.array(ps)[order] * (len(ps) - np.arange(len(ps)))
    corrected = np.empty(len(ps))
    corrected[order] = np.minimum(1, np.maximum.accumulate(stepped))
    return [float(p) for p in corrected]


def sent_or_kept(sent: np.ndarray, kept: np.ndarray) -> float:
    """p that a model which never saw the answers that were sent gives them such likelihoods: sent
    [N], and kept [N, M] of other answers to the same prompts, drawn in the same way. Exact: the
    rank of the sent answer is uniform, and the sum of N ranks has a known distribution."""
    count, others = kept.shape
    draw = np.random.Generator(np.random.PCG64(0))
    ties = (kept == sent[:, None]).sum(1)
    ranks = (kept < sent[:, None]).sum(1) + draw.integers(0, ties + 1)
    uniform = np.full(others + 1, 1 / (others + 1))
    sums = np.ones(1)
    for _ in range(count):
        sums = np.convolve(sums, uniform)
    return float(min(1.0, sums[int(ranks.sum()) :].sum()))
