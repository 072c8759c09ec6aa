"""Classifiers: models with one position per row, which read pixels and predict a label.

A row is the pixels of an image, then its label; a classifier reads only the pixels.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import ImageClassifierOutput

from configs.schema import LabError, Model, nearest


class MlpConfig(PreTrainedConfig):
    model_type = "mlp"

    pixels: int = 784
    hidden_size: int = 400
    num_hidden_layers: int = 2
    dropout: float = 0.0
    initializer_range: float = 0.02


class MlpClassifier(PreTrainedModel):
    """ReLU layers with dropout over grey levels: Hinton, Vinyals and Dean 2015, arXiv 1503.02531,
    section 3."""

    config_class = MlpConfig
    base_model_prefix = "layers"

    def __init__(self, config: MlpConfig) -> None:
        super().__init__(config)
        sizes = [config.pixels, *[config.hidden_size] * config.num_hidden_layers]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.head = nn.Linear(sizes[-1], config.num_labels)
        self.dropout = nn.Dropout(config.dropout)
        with torch.no_grad():
            for layer in (*self.layers, self.head):
                layer.bias.zero_()
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Weights are drawn by `initialise`, from a seed."""

    def forward(self, input_ids: Tensor, **ignored: Any) -> ImageClassifierOutput:
        """input_ids [B, L], grey levels from 0 to 255 and perhaps the label -> logits [B, labels].
        Options of language models, such as use_cache, are ignored."""
        hidden = input_ids[:, : self.config.pixels].to(self.head.weight.dtype) / 255
        for layer in self.layers:
            hidden = self.dropout(torch.relu(layer(hidden)))
        return ImageClassifierOutput(logits=self.head(hidden))


CLASSIFIERS = {"mlp": (MlpConfig, MlpClassifier)}
for config_class, model_class in CLASSIFIERS.values():
    AutoConfig.register(config_class.model_type, config_class)
    AutoModelForImageClassification.register(config_class, model_class)


def build_classifier(settings: Model, pixels: int, outcomes: int) -> nn.Module:
    """A classifier of images with this number of pixels, not yet initialised from a seed. LabError
    for an unknown setting."""
    config_class, model_class = CLASSIFIERS[settings.architecture]
    for key in ("num_attention_heads", "intermediate_size"):
        if getattr(settings, key) is not None:
            raise LabError(f"model.{key}: architecture {settings.architecture} has none; remove it")
    known = ("dropout",)
    for setting in settings.settings:
        if setting not in known:
            raise LabError(
                f"model.settings.{setting} is not a setting of {settings.architecture}"
                f"{nearest(setting, known)}"
            )
    return model_class(
        config_class(
            pixels=pixels,
            num_labels=outcomes,
            hidden_size=settings.hidden_size,
            num_hidden_layers=settings.num_hidden_layers,
            initializer_range=settings.initializer_range,
            **settings.settings,
        )
    )
