"""Ask a model: teacher-forced on the data's rows, and free-running on their prompts."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from measure.fidelity import calibration_columns, compare, sum_by_row
from tasks.rows import Rows, collate
from teacher.model import Forward, generate

BATCH_ROWS = 512


@dataclass
class Answers:
    """What a model says to the prompts of N rows: texts, and their log-probabilities in nats."""

    texts: list[str]
    log_probs: np.ndarray


def free_running(forward: Forward, task: Any, rows: Rows) -> Answers:
    """Greedy answers to every row's prompt."""
    texts: list[str] = [""] * len(rows)
    log_probs = np.zeros(len(rows))
    for length in np.unique(rows.prompt_lengths):
        group = np.flatnonzero(rows.prompt_lengths == length)
        for indices in np.array_split(group, -(-len(group) // BATCH_ROWS)):
            prompts = np.stack([rows.prompt(i) for i in indices]).astype(np.int64)
            tokens, revealed = generate(
                forward,
                torch.from_numpy(prompts),
                longest=task.longest_answer,
                end=task.tokenizer.eos_token_id,
                keep_log_probs=True,
            )
            for i, answer, chances in zip(indices, tokens, revealed, strict=True):
                texts[i] = task.render(answer.tolist())
                log_probs[i] = float(chances.gather(-1, answer[:, None]).sum())
    return Answers(texts, log_probs)


@torch.no_grad()
def completion_logits(forward: Forward, task: Any, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Teacher-forced logits [M, V] and targets [M] at the M completion positions, row by row."""
    order = np.argsort(rows.lengths, kind="stable")
    logits: list[torch.Tensor] = [torch.empty(0)] * len(rows)
    for indices in np.array_split(order, -(-len(rows) // BATCH_ROWS)):
        batch = collate(rows, indices, task.tokenizer.pad_token_id)
        flat = forward(batch.input_ids).logits[batch.counted].float()
        for i, piece in zip(indices, flat.split(batch.counted.sum(1).tolist()), strict=True):
            logits[i] = piece
    targets = torch.from_numpy(np.concatenate([rows.completion(i) for i in range(len(rows))]))
    return torch.cat(logits), targets.long()


def fidelity_columns(
    teacher_logits: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor, rows: Rows
) -> dict[str, np.ndarray]:
    """Per row, sums over the positions of its completion: the columns of `compare`, the number of
    `positions`, and `calibration` [rows, 3 * bins] of the logits themselves."""
    positions = (rows.lengths - rows.prompt_lengths).tolist()
    columns = compare(teacher_logits, logits, targets)
    columns["calibration"] = calibration_columns(logits, targets)
    sums = {name: sum_by_row(values, positions).numpy() for name, values in columns.items()}
    return {**sums, "positions": np.asarray(positions, float)}
