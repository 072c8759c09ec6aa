"""Learning from the teacher's hidden states: linear maps from student layers to teacher layers.

The student is narrower, so its states are compared through learned projections, which training
throws away (Romero et al. 2014, FitNets, arXiv 1412.6550, section 2.2; Jiao et al. 2019, TinyBERT,
arXiv 1909.10351, equation 8).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from teacher.signal import Signal


@dataclass
class Shown:
    """What a student under training shows: logits [B, L, V], projected [B, L, layers, W]."""

    logits: Tensor
    projected: Tensor


class Projected(nn.Module):
    """A student whose states after each of its layers are projected to the teacher's width W."""

    def __init__(self, student: nn.Module, width: int, seed: int) -> None:
        super().__init__()
        self.student = student
        inner = student.config.hidden_size
        generator = np.random.Generator(np.random.PCG64([seed, width]))
        self.projections = nn.ModuleList()
        for _ in range(student.config.num_hidden_layers):
            projection = nn.Linear(inner, width)
            drawn = generator.standard_normal((width, inner)) / inner**0.5
            with torch.no_grad():
                projection.weight.copy_(torch.from_numpy(drawn))
                projection.bias.zero_()
            self.projections.append(projection)

    @property
    def device(self) -> torch.device:
        return self.student.device

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Shown:
        output = self.student(input_ids, use_cache=use_cache, output_hidden_states=True)
        states = zip(self.projections, output.hidden_states[1:], strict=True)
        projected = torch.stack([projection(state) for projection, state in states], dim=2)
        return Shown(output.logits, projected)


def hidden_match(projected: Tensor, signal: Signal) -> Tensor:
    """Mean squared error to the teacher's states: [P, layers, W] -> [P]. TinyBERT, equation 8;
    1 for a student that says the mean, as the signal's dimensions have variance 1.
    """
    return (projected - signal.hidden).square().mean(dim=(1, 2))
