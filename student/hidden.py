"""Learning from what goes on inside the teacher: its states, where it looks, and which of the
values it finds there are alike.

The student is narrower, so its states are compared through learned projections, which training
throws away (Romero et al. 2014, FitNets, arXiv 1412.6550, section 2.2; Jiao et al. 2019, TinyBERT,
arXiv 1909.10351, equation 8). Attention needs none: both look at the same positions.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from teacher.signal import Inside, shows_states, states_of

FLOOR = 1e-4


@dataclass
class Shown:
    """What a student under training shows: logits [B, L, V], projected [B, L, layers, W],
    attention [B, L, layers, L], the mean of the heads; the relations of its values behind it, if
    they are to be matched."""

    logits: Tensor
    projected: Tensor
    attention: Tensor


class Projected(nn.Module):
    """A student whose states after each of its layers are projected to the teacher's width W."""

    def __init__(self, student: nn.Module, width: int, seed: int, relations: bool = False) -> None:
        super().__init__()
        self.student, self.relations = student, relations
        inner = student.config.hidden_size
        generator = np.random.Generator(np.random.PCG64([seed, width]))
        self.projections = nn.ModuleList()
        for _ in range(student.config.num_hidden_layers):
            projection = nn.Linear(inner, width, dtype=student.dtype)
            drawn = generator.standard_normal((width, inner)) / inner**0.5
            with torch.no_grad():
                projection.weight.copy_(torch.from_numpy(drawn))
                projection.bias.zero_()
            self.projections.append(projection)

    @property
    def device(self) -> torch.device:
        return self.student.device

    @property
    def config(self) -> Any:
        """The student's."""
        return self.student.config

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Shown:
        layers = range(1, len(self.projections) + 1)
        options = {"use_cache": use_cache} | shows_states(layers, self.relations)
        output = self.student(input_ids, **options)
        states, attention = states_of(output, layers, self.relations)
        projected = [layer(states[:, :, i]) for i, layer in enumerate(self.projections)]
        return Shown(output.logits, torch.stack(projected, dim=2), attention)


def student_of(model: nn.Module) -> nn.Module:
    """The model itself, without what only training needs."""
    return model.student if isinstance(model, Projected) else model


def hidden_match(projected: Tensor, inside: Inside) -> Tensor:
    """Mean squared error to the teacher's states: [P, layers, W] -> [P]. TinyBERT, equation 8;
    1 for a student that says the mean, as the dimensions revealed have variance 1.
    """
    return (projected - inside.hidden).square().mean(dim=(1, 2))


def attention_match(attention: Tensor, inside: Inside) -> Tensor:
    """KL(teacher || student) between where they look, in nats, the mean over layers:
    [P, layers, K] -> [P]. Wang et al. 2020 (MiniLM), arXiv 2002.10957, equation 5, but for the
    mean of the heads: which head looks where is an accident, and to copy it head by head made the
    student of `pronounce` worse. FLOOR keeps the logarithm finite where a probability is 0; with it
    the divergence is 0 where both look alike, and can be some 0.0005 nats lower elsewhere.
    """
    layers = inside.hidden.shape[1]
    return divergence_of_maps(attention[:, :layers], inside.attention[:, :layers])


def relation_match(attention: Tensor, inside: Inside) -> Tensor:
    """The same between the relations of their values, which follow the attention: MiniLM,
    equation 8."""
    layers = inside.hidden.shape[1]
    return divergence_of_maps(attention[:, layers:], inside.attention[:, layers:])


def divergence_of_maps(student: Tensor, teacher: Tensor) -> Tensor:
    ratio = (teacher + FLOOR).log() - (student + FLOOR).log()
    return (teacher * ratio).sum(-1).mean(-1)
