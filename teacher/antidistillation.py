"""Answers that teach less: antidistillation sampling (Savani et al. 2025, arXiv 2504.13146).

A proxy stands for the students that nobody knows. At every token, the teacher prefers what would
raise the proxy's loss on the task if the proxy learned it, as far as the teacher itself finds it
likely.
"""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutput

from configs.schema import LabError
from models.language import logits_at
from models.rows import Rows, collate
from tasks.task import Task

STEP = 1e-3  # by which the proxy's weights move along the gradient, relative to their norm
ROWS = 512  # of the validation split, that the gradient is taken on
BATCH_ROWS = 64
PLAIN = "full_attention"  # as transformers calls it


class Antidistilled(nn.Module):
    """A teacher whose log-probabilities [B, L, V] have an addition: `strength` times the derivative
    of the proxy's log-probabilities along the gradient of its loss (section 3, equations 9 to 11),
    by central differences. The gradient is scaled to the norm of the weights, so that `strength`
    does not depend on its length."""

    def __init__(
        self, teacher: nn.Module, proxy: nn.Module, gradient: list[Tensor], strength: float
    ) -> None:
        super().__init__()
        self.teacher, self.strength = teacher, strength
        self.ahead, self.behind = (moved(proxy, gradient, sign * STEP) for sign in (1, -1))
        self.parts = [self.teacher, self.ahead, self.behind]
        self.config = copy.deepcopy(teacher.config)  # of a cache that holds those of all three
        kinds = [kinds_of_layers(one.config) for one in self.parts]
        self.counts = [len(found) for found in kinds]
        self.config.num_hidden_layers = sum(self.counts)
        self.config.layer_types = [kind for found in kinds for kind in found]
        self.config.antidistillation = strength  # FLOPs are counted once per config

    @property
    def device(self) -> torch.device:
        return self.teacher.device

    def forward(
        self, input_ids: Tensor, past_key_values: DynamicCache | None = None, **options: Any
    ) -> CausalLMOutput:
        found, start = [], 0
        for model, count in zip(self.parts, self.counts, strict=True):
            end = start + count
            cache = None
            if past_key_values is not None:
                cache = DynamicCache()
                cache.layers = past_key_values.layers[start:end]
            logits = model(input_ids, past_key_values=cache, **options).logits
            found.append(torch.log_softmax(logits.float(), dim=-1))
            start = end
        teacher, ahead, behind = found
        slope = (ahead - behind) / (2 * STEP)
        return CausalLMOutput(logits=teacher + self.strength * slope)


def kinds_of_layers(config: PreTrainedConfig) -> list[str]:
    """LabError for a model whose layers are not all plain attention: they share a cache."""
    kinds = getattr(config, "layer_types", None) or [PLAIN] * config.num_hidden_layers
    cache = DynamicCache(config=config)
    if {*kinds} != {PLAIN} or not all(type(layer) is DynamicLayer for layer in cache.layers):
        raise LabError(
            f"antidistillation needs plain attention, and {config.model_type} has other layers; "
            "use one such as llama"
        )
    return kinds


def moved(model: nn.Module, gradient: list[Tensor], step: float) -> nn.Module:
    """A copy whose weights lie a step, relative to their norm, along a gradient."""
    other = copy.deepcopy(model)
    parameters = [*other.parameters()]
    scale = step * norm(parameters) / norm(gradient)
    with torch.no_grad():
        for parameter, slope in zip(parameters, gradient, strict=True):
            parameter += scale * slope
    return other.eval()


def norm(tensors: Sequence[Tensor]) -> float:
    return sum(float(tensor.detach().double().square().sum()) for tensor in tensors) ** 0.5


def gradient_of_loss(proxy: nn.Module, task: Task, rows: Rows) -> list[Tensor]:
    """Of the proxy's mean cross-entropy on the completions of rows, by parameter."""
    parameters, total = [*proxy.parameters()], 0
    sums = [torch.zeros_like(parameter) for parameter in parameters]
    for start in range(0, len(rows), BATCH_ROWS):
        batch = collate(rows, np.arange(start, min(start + BATCH_ROWS, len(rows))), task.pad)
        logits = logits_at(proxy(batch.input_ids.to(proxy.device)), batch, task.vocabulary)
        targets = batch.targets.to(logits.device)
        loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
        for held, slope in zip(sums, torch.autograd.grad(loss, parameters), strict=True):
            held += slope
        total += len(targets)
    return [held / total for held in sums]
