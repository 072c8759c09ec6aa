"""Objectives over large vocabularies: the same, in a fraction of the memory."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.schema import Model
from student import chunked
from student.objectives import cross_entropy, forward_kl, generalised_jsd
from tasks.pronounce import Pronounce
from tasks.rows import collate
from teacher.model import build_model, initialise
from teacher.signal import Signal

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("objective", [cross_entropy, forward_kl, generalised_jsd])
@pytest.mark.parametrize("positions", [1, 7, 40])
def test_in_chunks_value_and_gradient_are_those_of_all_at_once(objective, positions, generator):
    states = torch.randn(40, 8, generator=generator)
    teacher = torch.log_softmax(torch.randn(40, 300, generator=generator), -1)
    signal = Signal(torch.arange(40), teacher)
    found = []
    for run in (
        lambda states, head: objective(head(states), signal),
        lambda states, head: chunked.chunked(objective, states, head, signal, positions),
    ):
        head = torch.nn.Linear(8, 300, bias=False)
        torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(1))
        inputs = states.clone().requires_grad_()
        losses = run(inputs, head)
        losses.mean().backward()
        found.append((losses, inputs.grad, head.weight.grad))
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(whole, parts, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_model_in_chunks_is_the_model(architecture):
    task = Pronounce(limit=200)
    shape = Model(
        architecture=architecture, hidden_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    model = initialise(build_model(shape, task.tokenizer, 72), 0)
    batch = collate(task.rows("train"), np.arange(20), 0)
    signal = Signal(batch.targets)
    whole = cross_entropy(model(batch.input_ids, use_cache=False).logits[batch.counted], signal)
    parts = chunked.losses_in_chunks(model, batch, cross_entropy, signal, 72)
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-5)


MEASURE = """
import resource, sys, torch
from student.chunked import chunked
from student.objectives import forward_kl
from teacher.signal import Signal
torch.set_num_threads(1)
M, V, H = 512, 49_152, 64
head = torch.nn.Linear(H, V, bias=False)
head.weight.grad = torch.zeros_like(head.weight)
states = torch.randn(M, H, requires_grad=True)
teacher = torch.empty(M, V, dtype=torch.float16)
for row in teacher:
    row.copy_(torch.log_softmax(torch.randn(V), -1))
signal = Signal(torch.zeros(M, dtype=torch.long), teacher)
positions = int(sys.argv[1])
chunked(forward_kl, states[:1], head, signal.part(0, 1), 1).sum().backward()  # libraries warm up
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if positions < M:
    chunked(forward_kl, states, head, signal, positions).sum().backward()
else:
    forward_kl(head(states), signal).sum().backward()
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) * 1024 / (2 * M * V * 4))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts peak memory in kilobytes as Linux does")
def test_the_peak_is_below_a_third_of_both_logits_in_float32():
    """Of 512 positions and 49,152 outcomes, 201 MB: what the objective takes beside the teacher's
    stored float16."""
    shares = {
        positions: float(
            subprocess.run(
                [sys.executable, "-c", MEASURE, str(positions)],
                cwd=ROOT, capture_output=True, text=True, check=True,
            ).stdout
        )
        for positions in (chunked.CHUNK // 49_152, 512)
    }  # fmt: skip
    small, whole = shares.values()
    assert small < 1 / 3
    assert whole > 1
