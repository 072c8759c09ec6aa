"""Access levels: what is revealed, stored and read back."""

import numpy as np
import pytest
import torch

from student.objectives import forward_kl
from teacher.access import ACCESS
from teacher.signal import finite


@pytest.mark.parametrize("access", ["top_k", "sampled", "logits"])
def test_tokens_that_a_teacher_excludes_cost_nothing(access, generator):
    """Logits of -inf, and of less than float16 can hold, give finite losses and gradients."""
    logits = torch.randn(5, 12, generator=generator)
    logits[:, 3], logits[:, 7] = -torch.inf, -1e6
    level, k = ACCESS[access], 8
    targets = torch.zeros(5, dtype=torch.long)
    signal = level.reveal(finite(logits.log_softmax(-1)), targets, k, generator)
    stored = level.store(signal, k, 12)
    assert all(np.isfinite(column).all() for column in stored.values())
    read = level.read(stored, targets, k)
    student = torch.randn(5, 12, generator=generator, requires_grad=True)
    loss = forward_kl(student, read).sum()
    loss.backward()
    assert bool(loss.isfinite())
    assert bool(student.grad.isfinite().all())


@pytest.mark.parametrize("access", ["top_k", "sampled", "logits", "hidden"])
def test_a_live_signal_teaches_what_the_stored_one_does(access, generator):
    """A student that writes its own text learns from signals that were never stored."""
    level, k, targets = ACCESS[access], 8, torch.zeros(5, dtype=torch.long)
    log_probs = torch.randn(5, 12, generator=generator).log_softmax(-1)
    student = torch.randn(5, 12, generator=generator)
    live = level.reveal(log_probs, targets, k, generator)
    stored = level.read(level.store(live, k, 12), targets, k)
    torch.testing.assert_close(
        forward_kl(student, live), forward_kl(student, stored), atol=5e-3, rtol=5e-3
    )


def test_draws_are_independent_of_each_other(generator):
    """A likely outcome is drawn again and again: there may be more draws than outcomes."""
    log_probs = torch.tensor([[0.7, 0.2, 0.1], [0.05, 0.05, 0.9]]).log()
    signal = ACCESS["sampled"].reveal(log_probs, torch.zeros(2, dtype=torch.long), 4000, generator)
    assert signal.indices.shape == (2, 4000)
    counts = torch.stack([torch.bincount(row, minlength=3) for row in signal.indices])
    torch.testing.assert_close(counts / 4000, log_probs.exp(), atol=0.025, rtol=0)
    torch.testing.assert_close(signal.weights.sum(-1), torch.ones(2))
