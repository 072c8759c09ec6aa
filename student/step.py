"""The loss of a step, part by part: what `fit` differentiates, and what a self-check looks at."""

from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import Tensor, nn

from student import chunked
from student.hidden import student_of
from student.lessons import Lessons
from student.recipe import Match, Objective
from tasks.rows import collate


@dataclass(frozen=True)
class Goal:
    """What a training minimises: the mean of an objective over positions, weighted, and while it
    looks inside, the mean over all positions of what it misses there."""

    objective: Objective
    match: Match | None
    pad: int
    vocabulary: int
    prompt_weight: float

    def looks(self, progress: float) -> bool:
        return self.match is not None and progress < self.match.until

    def loss(
        self,
        model: nn.Module,
        now: Lessons,
        part: np.ndarray,
        whole: tuple[float, int],
        progress: float = 0.0,
    ) -> Tensor:
        """The share of some rows in the loss of a step. `whole`: the weights and the positions of
        all its rows (see `weight_of`), so that the shares add up to the same loss however a step is
        divided."""
        total, positions = whole
        looks = self.looks(progress)
        learner = model if looks else student_of(model)
        batch = collate(now.rows, part, self.pad, self.prompt_weight)
        signal = now.signal(batch).to(model.device)
        objective = partial(self.objective, progress=progress)
        if self.vocabulary >= chunked.LARGE and not looks:
            losses = chunked.losses_in_chunks(learner, batch, objective, signal, self.vocabulary)
        else:
            shown = learner(batch.input_ids.to(model.device), use_cache=False)
            losses = objective(shown.logits[batch.counted][:, : self.vocabulary], signal)
        loss = (losses * batch.weights.to(model.device)).sum() / total
        if looks:
            inside = now.inside(batch).to(model.device)
            loss = loss + self.match(shown, batch.positions, inside, progress).sum() / positions
        return loss
