"""FLOP counts that torch's FlopCounterMode lacks: the fused attention of CPUs."""

from typing import Any

import torch
from torch.utils.flop_counter import (
    register_flop_formula,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

aten = torch.ops.aten


@register_flop_formula(aten._scaled_dot_product_flash_attention_for_cpu)
def forward_of_attention(
    query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *rest: Any, **options: Any
) -> int:
    """Shapes [B, heads, L, D]. All positions are counted, masked ones too, as in other kernels."""
    return sdpa_flop_count(query, key, value)


@register_flop_formula(aten._scaled_dot_product_flash_attention_for_cpu_backward)
def backward_of_attention(
    gradient: tuple[int, ...],
    query: tuple[int, ...],
    key: tuple[int, ...],
    value: tuple[int, ...],
    *rest: Any,
    **options: Any,
) -> int:
    """The scores are computed again, which is counted."""
    return sdpa_backward_flop_count(gradient, query, key, value)
