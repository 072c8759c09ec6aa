"""Ask a model, teacher-forced and free-running, and compare what it says with the teacher."""

from dataclasses import dataclass

import numpy as np
import torch

from measure.fidelity import calibration_columns, compare, sum_by_row
from measure.statistics import Metric, expected_calibration_error
from tasks.rows import Rows, collate
from tasks.task import Ratio, Task, in_words_of
from teacher.model import KEPT, Forward, answers_of, device_of, rows_at_once

BATCH_ROWS = 512


@dataclass
class Answers:
    """What a model says to the prompts of N rows: texts, and their log-probabilities in nats."""

    texts: list[str]
    log_probs: np.ndarray


def free_running(forward: Forward, task: Task, rows: Rows) -> Answers:
    """Greedy answers to every row's prompt."""
    texts: list[str] = [""] * len(rows)
    log_probs = np.zeros(len(rows))
    for i, answer in answers_of(
        forward,
        rows,
        BATCH_ROWS,
        longest=task.longest_answer,
        end=task.tokenizer.eos_token_id,
        vocabulary=len(task.tokenizer),
    ):
        texts[i] = task.render(answer.tokens.tolist())
        log_probs[i] = answer.log_prob
    return Answers(texts, log_probs)


@torch.no_grad()
def completion_logits(
    forward: Forward, task: Task, rows: Rows, places: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Teacher-forced logits [M, V] and targets [M] at the completion positions of some rows, row
    by row, and how many positions each has; on the device of the model."""
    batch = collate(rows, places, task.tokenizer.pad_token_id)
    device = device_of(forward)
    logits = forward(batch.input_ids.to(device), use_cache=False).logits[batch.counted.to(device)]
    positions = batch.counted.sum(1).tolist()
    return logits[:, : len(task.tokenizer)], batch.targets.to(device), positions


@dataclass
class Judged:
    """One model on one split: what it said, and per-row sums that every metric is made of."""

    answers: Answers
    columns: dict[str, np.ndarray]  # [rows], but calibration [rows, 3 * bins]


class Reference:
    """The teacher on the rows of one split, compared with every student, batch by batch: its
    logits are kept where they are few, and asked for again where they are not. A teacher with `own`
    words for the task is compared by its answers alone."""

    def __init__(self, teacher: Forward, task: Task, rows: Rows, own: Task | None = None) -> None:
        self.teacher, self.task, self.rows, self.own = teacher, task, rows, own or task
        self.by_token = self.own is task
        order = np.argsort(rows.lengths, kind="stable")
        at_once = rows_at_once(BATCH_ROWS, int(rows.lengths.max()), len(task.tokenizer))
        self.batches = np.array_split(order, -(-len(rows) // at_once))
        positions = int((rows.lengths - rows.prompt_lengths).sum())
        self.keeps = positions * len(task.tokenizer) <= KEPT
        self.kept: dict[int, torch.Tensor] = {}
        self.answers = free_running(teacher, self.own, in_words_of(self.own, task, rows))
        self.judged = self.compare(self.answers, teacher)

    def judge(self, model: Forward) -> Judged:
        """Ask a model the same, and compare."""
        return self.compare(free_running(model, self.task, self.rows), model)

    def teachers_logits(self, number: int) -> torch.Tensor:
        """Of a batch."""
        if number in self.kept:
            return self.kept[number]
        logits, _, _ = completion_logits(self.teacher, self.task, self.rows, self.batches[number])
        if self.keeps:
            self.kept[number] = logits
        return logits

    def compare(self, answers: Answers, model: Forward) -> Judged:
        """Columns: those of `compare`, `positions`, `calibration`, the task's, and whether the
        free-running answer is the teacher's own (`same`)."""
        sums: dict[str, np.ndarray] = {}
        for number, places in enumerate(self.batches if self.by_token else []):
            teacher = self.teachers_logits(number)
            logits, targets, positions = completion_logits(model, self.task, self.rows, places)
            columns = compare(teacher, logits, targets)
            columns["calibration"] = calibration_columns(logits, targets)
            for name, values in columns.items():
                found = sum_by_row(values.cpu(), positions).numpy()
                whole = sums.setdefault(name, np.empty((len(self.rows), *found.shape[1:])))
                whole[places] = found
        same = [a == b for a, b in zip(answers.texts, self.answers.texts, strict=True)]
        positions = self.rows.lengths - self.rows.prompt_lengths
        sums |= {"positions": positions.astype(float), "same": np.asarray(same, float)}
        sums |= self.task.agree(answers.texts, self.answers.texts)
        return Judged(answers, sums | self.task.grade(self.rows.ids, answers.texts))

    def metrics(self, seeds: list[Judged]) -> dict[str, dict[str, Metric]]:
        """{"quality": …, "fidelity": …} of one arm, over its seeds."""
        wrong = self.judged.columns["wrong"]
        units = self.task.units(self.rows.ids[np.arange(len(wrong))])

        def of_units(values: np.ndarray) -> np.ndarray:
            """[rows, ...] -> [units, ...]: intervals are over what was drawn by itself."""
            if units is None:
                return values
            sums = np.zeros((units.max() + 1, *values.shape[1:]))
            np.add.at(sums, units, values)
            return sums

        for one in seeds:
            one.columns |= {"rows": np.ones(len(wrong)), "errors": wrong}
            one.columns["copied"] = one.columns["same"] * wrong

        def ratio_of(top: str, bottom: str) -> Metric:
            pairs = [np.stack([s.columns[top], s.columns[bottom]], axis=-1) for s in seeds]
            return Metric(np.stack([of_units(pair) for pair in pairs]))

        per_token = ("kl_teacher_student", "kl_student_teacher", "top1_agreement", "nll_gap")
        by_token = {}
        if self.by_token:
            calibration = np.stack([of_units(s.columns["calibration"]) for s in seeds])
            by_token = {name: ratio_of(name, "positions") for name in per_token}
            by_token["ece"] = Metric(calibration, expected_calibration_error)

        def of_task(metrics: dict[str, Ratio]) -> dict[str, Metric]:
            """Those that these rows tell: no problem of 6 steps, no accuracy there."""
            columns = seeds[0].columns
            told = {name: pair for name, pair in metrics.items() if columns[pair[1]].any()}
            return {name: ratio_of(*pair) for name, pair in told.items()}

        return {
            "quality": of_task(self.task.quality),
            "fidelity": {
                **of_task(self.task.agreement),
                **by_token,
                "sequence_agreement": ratio_of("same", "rows"),
                "agreement_on_teacher_errors": ratio_of("copied", "errors"),
            },
        }
