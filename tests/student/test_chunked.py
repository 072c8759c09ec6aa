"""Objectives over large vocabularies: the same, in a fraction of the memory."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from configs.schema import Model
from models.language import LinearHead, build_model, initialise
from models.rows import collate
from student import chunked, objectives
from student.loss import Loss
from student.objectives import cross_entropy
from student.recipe import FROM_TEXT, objective_of
from student.training_set import TrainingSet
from tasks.pronounce import Pronounce
from teacher.signal import Signal
from tests.helpers import DIVERGENCES, ROOT


@pytest.mark.parametrize("name", ["cross_entropy", *DIVERGENCES])
@pytest.mark.parametrize(
    ("positions", "outcomes", "chunks"), [(40, 300, 40), (40, 300, 6), (12, 49_152, 4)]
)
@pytest.mark.parametrize(("bias", "scale"), [(False, 1.0), (True, 0.25)])
def test_in_chunks_value_and_gradient_are_those_of_all_at_once(
    name, positions, outcomes, chunks, bias, scale, generator, monkeypatch
):
    monkeypatch.setattr(chunked, "CHUNKS", chunks)
    objective = getattr(objectives, name)
    states = torch.randn(positions, 8, generator=generator)
    teacher = torch.log_softmax(torch.randn(positions, outcomes, generator=generator), -1)
    signal, weights = Signal(torch.arange(positions), teacher), torch.rand(positions)
    found = []
    for run in (
        lambda states, head: objective(head.logits(states), signal),
        lambda states, head: chunked.chunked(objective, states, head, signal, outcomes),
    ):
        head = torch.nn.Linear(8, outcomes, bias=bias)
        for number, parameter in enumerate(head.parameters()):
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(number))
        inputs = states.clone().requires_grad_()
        losses = run(inputs, LinearHead(head.weight, head.bias, scale))
        (losses * weights).sum().backward()
        found.append((losses, inputs.grad, *(p.grad for p in head.parameters())))
    for whole, parts in zip(*found, strict=True):
        largest = float(whole.detach().abs().max())
        torch.testing.assert_close(whole, parts, atol=1e-5 * largest, rtol=1e-5)


def test_padding_of_a_head_is_no_outcome_and_gets_no_gradient(generator):
    states = torch.randn(10, 8, generator=generator, requires_grad=True)
    head = torch.nn.Linear(8, 32, bias=False)
    signal = Signal(torch.arange(10), torch.log_softmax(torch.randn(10, 30), -1))
    whole = LinearHead(head.weight, None, 1.0)
    losses = chunked.chunked(objectives.forward_kl, states, whole, signal, 30)
    torch.testing.assert_close(losses, objectives.forward_kl(head(states)[:, :30], signal))
    losses.sum().backward()
    assert head.weight.grad[:30].any()
    assert not head.weight.grad[30:].any()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_model_in_chunks_is_the_model(architecture):
    task = Pronounce(limit=200)
    shape = Model(
        architecture=architecture, hidden_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    model = initialise(build_model(shape, task), 0)
    batch = collate(task.rows("train"), np.arange(20), 0)
    signal = Signal(batch.targets)
    whole = cross_entropy(model(batch.input_ids, use_cache=False).logits[batch.counted], signal)
    parts = chunked.losses_in_chunks(model, batch, cross_entropy, signal, 72)
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-5)


def test_a_loss_is_computed_in_chunks_where_the_vocabulary_is_large(monkeypatch):
    """And has the same value."""
    task = Pronounce(limit=200)
    shape = Model(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = initialise(build_model(shape, task), 0)
    data, some = TrainingSet(task.rows("train"), order=None), np.arange(20)
    loss = Loss(objective_of(FROM_TEXT), None, 0, 72, 0.0)
    calls, losses_in_chunks = [], chunked.losses_in_chunks
    monkeypatch.setattr(
        chunked, "losses_in_chunks", lambda *given: calls.append(1) or losses_in_chunks(*given)
    )
    found = []
    for large, called in ((73, 0), (72, 1)):
        monkeypatch.setattr(chunked, "LARGE_VOCABULARY", large)
        found.append(loss(model, data, some, loss.normalizer(data.rows, some)))
        assert len(calls) == called
    torch.testing.assert_close(*found)


MEASURE = """
import sys, torch
from models.language import LinearHead
from student import chunked, objectives
from teacher.signal import Signal
torch.set_num_threads(1)


def peak():
    # in kB; getrusage would begin at the peak of the process that started this one
    lines = open("/proc/self/status", encoding="utf-8").read().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


M, V, H = 512, 49_152, 64
objective, in_chunks = getattr(objectives, sys.argv[1]), sys.argv[2] == "chunks"
head = torch.nn.Linear(H, V, bias=False)
head.weight.grad = torch.zeros_like(head.weight)
states = torch.randn(M, H, requires_grad=True)
teacher = torch.empty(M, V, dtype=torch.float16)
for row in teacher:
    row.copy_(torch.log_softmax(torch.randn(V), -1))
signal = Signal(torch.zeros(M, dtype=torch.long), teacher)
objective(head(states[:1]), signal.part(0, 1)).sum().backward()  # libraries warm up
before = peak()
if in_chunks:
    whole = LinearHead(head.weight, head.bias, 1.0)
    chunked.chunked(objective, states, whole, signal, V).sum().backward()
else:
    objective(head(states), signal).sum().backward()
after = peak()
print((after - before) * 1024 / (2 * M * V * 4))
"""


def peak(name: str, how: str) -> float:
    """Beside the teacher's stored float16, as a share of both logits in float32: 201 MB. Freed
    memory goes back at once, so that it is not the allocator that is measured."""
    command = [sys.executable, "-c", MEASURE, name, how]
    settings = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True, env=settings
    )
    return float(done.stdout)


linux = pytest.mark.skipif(
    sys.platform != "linux", reason="counts peak memory in kilobytes as Linux does"
)


@linux
@pytest.mark.parametrize(
    "name",
    ["forward_kl", *(pytest.param(n, marks=pytest.mark.slow) for n in DIVERGENCES[1:])],
)
def test_the_peak_is_below_a_third_of_both_logits_in_float32(name):
    """Of 512 positions and 49,152 outcomes."""
    assert peak(name, "chunks") < 1 / 3


@linux
def test_all_at_once_takes_more_than_both_logits():
    assert peak("forward_kl", "at once") > 1
