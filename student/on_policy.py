"""On-policy distillation: the student writes, and the teacher scores every token. Also
reinforcement learning from right/wrong rewards.

Agarwal et al. 2023 (GKD), arXiv 2306.13649, algorithm 1: a student trained only on good text never
learns to continue from its own mistakes. Shao et al. 2024 (GRPO), arXiv 2402.03300, section 4.1:
the advantage of an answer is its reward relative to the student's other answers to the same prompt.
The FLOPs of writing and scoring are charged.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor, nn

from configs.schema import Recipe, value_at
from models.generate import answers_of
from models.language import Forward, device_of, linear_head, logits_at, precise
from models.rows import Batch, Rows, batch_order, collate
from student import chunked
from student.training_set import TrainingSet
from teacher.access import ACCESS
from teacher.signal import ComputedSignal, Signal, finite


@dataclass(frozen=True)
class OnPolicy:
    """Makes the training sets of the steps at which the student writes.

    rows: the source of its prompts. counted: wraps a model so that its forward passes are counted;
    `teacher` is already wrapped, and both have `flops`. Without a teacher there are rewards:
    rows -> [N] from 0 to 1.
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
        """Batches of prompts of similar lengths."""
        prompts = self.batch_rows // self.recipe.student.group if self.rewards else self.batch_rows
        return batch_order(self.rows.prompt_lengths, max(1, prompts), self.seed)

    def share(self, progress: float) -> float:
        if self.recipe.sequences == "student":
            return 1.0
        return value_at(self.recipe.student.on_policy, progress)

    def due(self, step: int, progress: float) -> bool:
        """Whether the student writes at this step: a function of (seed, step) and the schedule."""
        return np.random.Generator(np.random.PCG64([self.seed, step, 0])).random() < self.share(
            progress
        )

    def written(self, student: nn.Module, step: int) -> TrainingSet:
        """The student's answers to the prompts of this step, with the signal at their tokens."""
        places = self.order(step)
        if self.rewards:
            places = np.repeat(places, self.recipe.student.group)
        prompts = self.rows.take(places)
        bits = int(np.random.PCG64([self.seed, step, 1]).random_raw(1)[0]) >> 1
        generator = torch.Generator().manual_seed(bits)
        writer, started = self.counted(student), time.monotonic()
        student.eval()
        rows = write(writer, prompts, self, generator)
        student.train()
        writing = time.monotonic() - started
        if self.rewards:
            rows, everything, flops = *self.rewarded(rows), 0.0
        else:
            everything, flops = self.scored(rows, generator)
        ends = np.concatenate([[0], np.cumsum(rows.lengths - rows.prompt_lengths)])

        def signal(part: Batch) -> Signal:
            places = [np.arange(ends[i], ends[i + 1]) for i in part.indices]
            return everything.take(torch.from_numpy(np.concatenate(places)))

        return TrainingSet(rows, signal, flops=writer.flops + flops, writing_seconds=writing)

    def scored(
        self, rows: Rows, generator: torch.Generator
    ) -> tuple[Signal | ComputedSignal, float]:
        """(the teacher's signal at every token that the student wrote, the FLOPs it cost)."""
        before = self.teacher.flops
        batch = collate(rows, np.arange(len(rows)), pad=self.end)
        model, reveals = getattr(self.teacher, "model", None), ACCESS[self.recipe.access].reveals
        if "distribution" in reveals and chunked.pays(model, self.vocabulary):
            return self.scored_in_parts(model, batch), self.teacher.flops - before
        with torch.no_grad():
            ids = batch.input_ids.to(device_of(self.teacher))
            logits = logits_at(self.teacher(ids, use_cache=False), batch, self.vocabulary)
            log_probs = finite(torch.log_softmax(logits, -1))
        # once for all rows: every micro-batch, and every process, sees the same draws
        reveal = ACCESS[self.recipe.access].reveal
        signal = reveal(log_probs, batch.targets, self.recipe.outputs.k, generator)
        return signal, self.teacher.flops - before

    def scored_in_parts(self, model: nn.Module, batch: Batch) -> ComputedSignal:
        """The teacher's distributions over a large vocabulary, which the objective computes from
        its last states, a part at a time."""
        head = linear_head(model)
        ids = batch.input_ids.to(model.device)
        with torch.no_grad():
            output = self.teacher.charge(partial(model.base_model, use_cache=False), ids)
        states = output.last_hidden_state[batch.counted]
        # charged as a whole pass is, whose head reads every token
        self.teacher.flops += 2.0 * ids.numel() * head.weight.numel()

        @torch.no_grad()
        def log_probs_of(states: Tensor) -> Tensor:
            logits = precise(head.logits(states)[:, : self.vocabulary])
            return finite(torch.log_softmax(logits, -1))

        return ComputedSignal(batch.targets, states, log_probs_of)

    def rewarded(self, rows: Rows) -> tuple[Rows, Signal]:
        """(answers that give a gradient, the advantage of each of their tokens).

        An advantage is the reward minus the mean of its group, divided by the group's standard
        deviation. As the loss of a step is the mean over all its tokens, it is multiplied by mean
        length / length, so that answers of all lengths count equally (1/|o| in equation 3). A group
        whose answers all have the same reward gives no gradient and is dropped, though its writing
        is charged (Yu et al. 2025 (DAPO), arXiv 2503.14476, section 3.2). If this holds for all
        groups, one is kept, with gradient 0."""
        rewards = self.rewards(rows).reshape(-1, self.recipe.student.group)
        spread = rewards.std(1, keepdims=True)
        advantages = (rewards - rewards.mean(1, keepdims=True)) / np.maximum(spread, 1e-6)
        informative = spread[:, 0] > 0
        informative[0] |= not informative.any()
        rows = rows.take(np.flatnonzero(np.repeat(informative, self.recipe.student.group)))
        advantages = advantages[informative]
        lengths = rows.lengths - rows.prompt_lengths
        per_token = advantages.ravel() * lengths.mean() / lengths
        per_token = torch.from_numpy(np.repeat(per_token.astype(np.float32), lengths))
        batch = collate(rows, np.arange(len(rows)), pad=self.end)
        return rows, Signal(batch.targets, advantages=per_token)


def write(writer: Forward, prompts: Rows, policy: OnPolicy, generator: torch.Generator) -> Rows:
    """A model's answers to every prompt, as rows."""
    answers: list[list[int]] = [[]] * len(prompts)
    for i, answer in answers_of(
        writer,
        prompts,
        batch_rows=len(prompts),
        longest=policy.longest,
        end=policy.end,
        temperature=policy.recipe.student.temperature,
        generator=generator,
        vocabulary=policy.vocabulary,
    ):
        answers[i] = answer.tokens.tolist()
    return Rows.build(
        prompts.ids.tolist(), [prompts.prompt(i).tolist() for i in range(len(prompts))], answers
    )
