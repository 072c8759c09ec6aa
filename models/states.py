"""The internals of a transformer: its hidden states, attention maps and value relations."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def states_options(layers: Sequence[int], relations: bool = False) -> dict[str, bool]:
    """The options of a forward pass that `states_of` reads."""
    cache = {"use_cache": True} if relations else {}
    return {"output_hidden_states": bool(layers), "output_attentions": bool(layers), **cache}


def states_of(output: Any, layers: Sequence[int], relations: bool = False) -> tuple[Tensor, Tensor]:
    """(states [B, L, layers, W], maps [B, L, layers, K]) of a forward pass with `states_options`.

    Layers count from 1. The maps are the attention of each layer, the mean over its heads; with
    `relations` the value relations of the layers follow: [B, L, 2 layers, K].
    """
    hidden = torch.stack([output.hidden_states[layer] for layer in layers], dim=2)
    maps = [output.attentions[layer - 1].mean(1) for layer in layers]
    if relations:
        cache, new = output.past_key_values, hidden.shape[1]
        maps += [value_relation(cache.layers[layer - 1].values, new) for layer in layers]
    return hidden, torch.stack(maps, dim=2)


def value_relation(values: Tensor, new: int) -> Tensor:
    """Value relations of the last `new` positions, values [B, heads, K, D] -> [B, new, K]:
    softmax(V V^T / sqrt(D)), the mean over heads. Wang et al. 2020 (MiniLM), arXiv 2002.10957,
    equation 7, restricted to positions up to each one, as in a causal model.
    """
    products = values[:, :, -new:] @ values.transpose(-1, -2) / values.shape[-1] ** 0.5
    length = values.shape[2]
    later = torch.ones(new, length, dtype=torch.bool, device=values.device).triu(length - new + 1)
    return products.masked_fill(later, -torch.inf).softmax(-1).mean(1)
