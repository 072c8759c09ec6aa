"""The loss of a step, micro-batch by micro-batch: what `fit` differentiates."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from models.language import autocast, logits_at
from models.rows import Rows, collate, weight_of
from student import chunked
from student.hidden import student_of
from student.recipe import HiddenLoss, LossFunction
from student.training_set import TrainingSet


@dataclass(frozen=True)
class Loss:
    """The weighted mean of an objective over positions plus, while hidden states are used, the
    hidden loss averaged over all positions."""

    objective: LossFunction
    hidden: HiddenLoss | None
    pad: int
    vocabulary: int
    prompt_weight: float
    dtype: torch.dtype | None = None  # of the matrix products; None: that of the weights

    def uses_hidden(self, progress: float) -> bool:
        return self.hidden is not None and progress < self.hidden.until

    def hidden_steps(self, steps: int) -> int:
        """How many of the first steps use hidden states."""
        return self.hidden.steps(steps) if self.hidden else 0

    def normalizer(self, rows: Rows, indices: np.ndarray) -> tuple[float, int]:
        """The denominators of a step on these rows: sum of weights, number of positions."""
        return weight_of(rows, indices, self.prompt_weight)

    def __call__(
        self,
        model: nn.Module,
        data: TrainingSet,
        indices: np.ndarray,
        normalizer: tuple[float, int],
        progress: float = 0.0,
    ) -> Tensor:
        """The contribution of some rows to the loss of a step. The normalizer is that of all rows
        of the step, so that contributions add up to the same loss however the step is split."""
        total_weight, positions = normalizer
        uses_hidden = self.uses_hidden(progress)
        learner = model if uses_hidden else student_of(model)
        batch = collate(data.rows, indices, self.pad, self.prompt_weight)
        signal = data.signal(batch).to(model.device)
        objective = partial(self.objective, progress=progress)
        if chunked.pays(student_of(model), self.vocabulary):
            losses, output = chunked.losses_in_chunks(
                learner, batch, objective, signal, self.vocabulary, self.dtype
            )
        else:
            with autocast(model.device, self.dtype):
                output = learner(batch.input_ids.to(model.device), use_cache=False)
            losses = objective(logits_at(output, batch, self.vocabulary), signal.whole())
        loss = (losses * batch.weights.to(model.device)).sum() / total_weight
        if uses_hidden:
            hidden = data.hidden(batch).to(model.device)
            losses = self.hidden(output.at(batch.positions), hidden, progress)
            loss = loss + losses.sum() / positions
        return loss
