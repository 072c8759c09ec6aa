"""The student writes: on-policy distillation, where the teacher says what it thinks of every token,
and reinforcement learning, where only right and wrong are known.

Agarwal et al. 2023 (GKD), arXiv 2306.13649, algorithm 1: a student that only reads good text never
learns to go on from its own mistakes. Shao et al. 2024 (GRPO), arXiv 2402.03300, section 4.1: an
answer is as good as its reward is above that of the student's other answers to the same prompt.
Writing and scoring cost FLOPs, which are charged.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import nn

from configs.schema import Recipe, value_at
from student.lessons import Lessons
from tasks.rows import Batch, Rows, batch_order, collate
from teacher.model import Forward, answers_of, device_of
from teacher.signal import Signal, reveal


@dataclass(frozen=True)
class OnPolicy:
    """Makes the lessons of the steps at which the student writes.

    rows: whose prompts it answers. counted: wraps a model so that its forward passes are counted,
    as the teacher already is; both have `flops`. Without a teacher there are rewards [N] of rows,
    from 0 to 1.
    """

    rows: Rows
    teacher: Forward | None
    rewards: Callable[[Rows], np.ndarray] | None
    counted: Callable[[nn.Module], Forward]
    recipe: Recipe
    seed: int
    batch_rows: int
    longest: int  # tokens of an answer
    end: int  # the token that ends it
    vocabulary: int

    @cached_property
    def order(self) -> Callable[[int], np.ndarray]:
        """Batches of prompts of one length, or nearly."""
        prompts = self.batch_rows // self.recipe.group if self.rewards else self.batch_rows
        return batch_order(self.rows.prompt_lengths, max(1, prompts), self.seed)

    def share(self, progress: float) -> float:
        if self.recipe.sequences == "student":
            return 1.0
        return value_at(self.recipe.on_policy, progress)

    def due(self, step: int, progress: float) -> bool:
        """Does the student write at this step? A function of (seed, step), as all randomness is."""
        return np.random.Generator(np.random.PCG64([self.seed, step, 0])).random() < self.share(
            progress
        )

    def lessons(self, student: nn.Module, step: int) -> Lessons:
        """What the student answers to the prompts of this step, and what is revealed there."""
        places = self.order(step)
        prompts = self.rows.take(np.repeat(places, self.recipe.group) if self.rewards else places)
        bits = int(np.random.PCG64([self.seed, step, 1]).random_raw(1)[0]) >> 1
        generator = torch.Generator().manual_seed(bits)
        writer, started = self.counted(student), time.monotonic()
        student.eval()
        rows = write(writer, prompts, self, generator)
        student.train()
        writing = time.monotonic() - started
        if self.rewards:
            rows, whole, flops = *self.rewarded(rows), 0.0
        else:
            whole, flops = self.scored(rows, generator)
        ends = np.concatenate([[0], np.cumsum(rows.lengths - rows.prompt_lengths)])

        def signal(part: Batch) -> Signal:
            return Signal.joined([whole.part(ends[i], ends[i + 1]) for i in part.indices])

        return Lessons(rows, signal, flops=writer.flops + flops, writing_seconds=writing)

    def scored(self, rows: Rows, generator: torch.Generator) -> tuple[Signal, float]:
        """(The teacher's signal at every token that the student wrote, what it cost.)"""
        before = self.teacher.flops
        batch = collate(rows, np.arange(len(rows)), pad=self.end)
        with torch.no_grad():
            ids = batch.input_ids.to(device_of(self.teacher))
            logits = self.teacher(ids, use_cache=False).logits[batch.counted.to(ids.device)]
            log_probs = torch.log_softmax(logits[:, : self.vocabulary].cpu(), -1)
        # once for all rows: every part of the step, and every process, sees the same draws
        whole = reveal(self.recipe.access, self.recipe.k, batch.targets, log_probs, generator)
        return whole, self.teacher.flops - before

    def rewarded(self, rows: Rows) -> tuple[Rows, Signal]:
        """(Answers that teach something, the advantage of each of their tokens.) Rewards less the
        mean of their group, by its deviation; and as the loss of a step is the mean over all its
        tokens, times mean length / own length, so that answers count alike, whatever their length
        (1/|o| in equation 3). Where all answers to a prompt are as good there is nothing to learn:
        they were paid for in writing, and a training step is not spent on them (Yu et al. 2025
        (DAPO), arXiv 2503.14476, section 3.2). If all are, one group stays, whose gradient is 0."""
        rewards = self.rewards(rows).reshape(-1, self.recipe.group)
        spread = rewards.std(1, keepdims=True)
        advantages = (rewards - rewards.mean(1, keepdims=True)) / np.maximum(spread, 1e-6)
        telling = spread[:, 0] > 0
        telling[0] |= not telling.any()
        rows = rows.take(np.flatnonzero(np.repeat(telling, self.recipe.group)))
        advantages = advantages[telling]
        lengths = rows.lengths - rows.prompt_lengths
        per_token = advantages.ravel() * lengths.mean() / lengths
        each = torch.from_numpy(np.repeat(per_token.astype(np.float32), lengths))
        batch = collate(rows, np.arange(len(rows)), pad=self.end)
        return rows, Signal(batch.targets, advantages=each)


def write(writer: Forward, prompts: Rows, policy: OnPolicy, generator: torch.Generator) -> Rows:
    """Answers of a model to every prompt, as rows."""
    answers: list[list[int]] = [[]] * len(prompts)
    for i, answer in answers_of(
        writer,
        prompts,
        batch_rows=len(prompts),
        longest=policy.longest,
        end=policy.end,
        temperature=policy.recipe.student_temperature,
        generator=generator,
        vocabulary=policy.vocabulary,
    ):
        answers[i] = answer.tokens.tolist()
    return Rows.build(
        prompts.ids.tolist(), [prompts.prompt(i).tolist() for i in range(len(prompts))], answers
    )
