"""Signals: cut into parts, and joined."""

from itertools import pairwise

import pytest
import torch

from teacher.signal import Signal


@pytest.mark.parametrize("cuts", [(0, 6), (0, 2, 6), (0, 1, 2, 6)])
def test_the_parts_of_a_signal_joined_are_the_signal(cuts, generator):
    log_probs = torch.randn(6, 5, generator=generator).log_softmax(-1)
    whole = Signal(torch.arange(6), log_probs)
    parts = [whole.part(start, stop) for start, stop in pairwise(cuts)]
    for tensor, expected in zip(Signal.joined(parts).tensors, whole.tensors, strict=True):
        assert tensor is expected is None or torch.equal(tensor, expected)
