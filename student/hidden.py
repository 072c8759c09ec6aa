"""Learning from the teacher's hidden states: the student's side.

The student is narrower, so its states are compared through learned projections that training
discards (Romero et al. 2014, FitNets, arXiv 1412.6550, section 2.2; Jiao et al. 2019, TinyBERT,
arXiv 1909.10351, equation 8). Attention needs none: both models attend to the same positions.
"""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.states import states_of, states_options


@dataclass
class StudentOutput:
    """A forward pass of a student that learns from hidden states: logits [B, L, V] or, where they
    are left out, the last_hidden_state [B, L, H]; attention [B, L, layers, L] (the mean of the
    heads) and, if they are matched, projected [B, L, layers, W] and value relations of the shape of
    attention. Indexed by positions [B, L], each is [P, ...]."""

    logits: Tensor | None
    projected: Tensor | None
    attention: Tensor
    relations: Tensor | None = None
    last_hidden_state: Tensor | None = None

    def at(self, positions: Tensor) -> "StudentOutput":
        tensors = (getattr(self, field.name) for field in fields(self))
        return StudentOutput(*(t if t is None else t[positions] for t in tensors))


class WithProjections(nn.Module):
    """A student whose states after each of its layers are projected to the teacher's width W; with
    W = 0, whose attention alone is read."""

    def __init__(self, student: nn.Module, width: int, seed: int, relations: bool = False) -> None:
        super().__init__()
        self.student, self.relations = student, relations
        self.layers = range(1, student.config.num_hidden_layers + 1)
        inner = student.config.hidden_size
        generator = np.random.Generator(np.random.PCG64([seed, width]))
        self.projections = nn.ModuleList()
        for _ in self.layers if width else ():
            projection = nn.Linear(inner, width, dtype=student.dtype)
            weight = generator.standard_normal((width, inner)) / inner**0.5
            with torch.no_grad():
                projection.weight.copy_(torch.from_numpy(weight))
                projection.bias.zero_()
            self.projections.append(projection)

    @property
    def device(self) -> torch.device:
        return self.student.device

    @property
    def config(self) -> Any:
        """The student's config."""
        return self.student.config

    def forward(
        self, input_ids: Tensor, use_cache: bool = False, logits: bool = True
    ) -> StudentOutput:
        layers = self.layers
        options = {"use_cache": use_cache} | states_options(layers, self.relations)
        output = (self.student if logits else self.student.base_model)(input_ids, **options)
        states, maps = states_of(output, layers, self.relations)
        projected = [layer(states[:, :, i]) for i, layer in enumerate(self.projections)]
        attention, relations = maps[:, :, : len(layers)], maps[:, :, len(layers) :]
        return StudentOutput(
            output.logits if logits else None,
            torch.stack(projected, dim=2) if projected else None,
            attention,
            relations if self.relations else None,
            None if logits else output.last_hidden_state,
        )


def student_of(model: nn.Module) -> nn.Module:
    """The model itself, without the projections that only training needs."""
    return model.student if isinstance(model, WithProjections) else model
