"""On-policy distillation: the student writes, the teacher says what it thinks of every token.

Agarwal et al. 2023 (GKD), arXiv 2306.13649, algorithm 1. A student that only reads good text never
learns to go on from its own mistakes. Writing and scoring cost FLOPs, which are charged.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import nn

from configs.schema import Recipe, value_at
from student.lessons import Lessons
from tasks.rows import Batch, Rows, batch_order, collate
from teacher.model import Forward, device_of, generate
from teacher.signal import Signal, reveal


@dataclass(frozen=True)
class OnPolicy:
    """Makes the lessons of the steps at which the student writes.

    rows: whose prompts it answers. counted: wraps a model so that its forward passes are counted,
    as the teacher already is; both have `flops`.
    """

    rows: Rows
    teacher: Forward
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
        return batch_order(self.rows.prompt_lengths, self.batch_rows, self.seed)

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
        """What the student answers to the prompts of this step, and the teacher's signal there."""
        prompts = self.rows.take(self.order(step))
        bits = int(np.random.PCG64([self.seed, step, 1]).random_raw(1)[0]) >> 1
        generator = torch.Generator().manual_seed(bits)
        writer, before = self.counted(student), self.teacher.flops
        student.eval()
        rows = write(writer, prompts, self, generator)
        student.train()
        batch = collate(rows, np.arange(len(rows)), pad=self.end)
        with torch.no_grad():
            ids = batch.input_ids.to(device_of(self.teacher))
            logits = self.teacher(ids, use_cache=False).logits[batch.counted.to(ids.device)]
            log_probs = torch.log_softmax(logits[:, : self.vocabulary].cpu(), -1)
        # once for all rows: every part of the step, and every process, sees the same draws
        whole = reveal(self.recipe.access, self.recipe.k, batch.targets, log_probs, generator)
        ends = np.cumsum([0, *batch.counted.sum(1).tolist()])

        def signal(part: Batch) -> Signal:
            return Signal.joined([whole.part(ends[i], ends[i + 1]) for i in part.indices])

        return Lessons(rows, signal, flops=writer.flops + self.teacher.flops - before)


def write(writer: Forward, prompts: Rows, policy: OnPolicy, generator: torch.Generator) -> Rows:
    """Answers of a model to every prompt, as rows."""
    answers: list[list[int]] = [[]] * len(prompts)
    for length in np.unique(prompts.prompt_lengths):
        group = np.flatnonzero(prompts.prompt_lengths == length)
        asked = np.stack([prompts.prompt(i) for i in group]).astype(np.int64)
        written = generate(
            writer,
            torch.from_numpy(asked),
            longest=policy.longest,
            end=policy.end,
            temperature=policy.recipe.student_temperature,
            generator=generator,
            vocabulary=policy.vocabulary,
        )
        for i, answer in zip(group, written, strict=True):
            answers[i] = answer.tokens.tolist()
    return Rows.build(
        prompts.ids.tolist(), [prompts.prompt(i).tolist() for i in range(len(prompts))], answers
    )
