"""Objectives over large vocabularies: the same, in a fraction of the memory."""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from configs.schema import Model
from experiment.cost import CountedForward
from experiment.experiment import loss_of, new_student, open_experiment, training_set_of
from models.language import LinearHead, build_model, initialise
from models.rows import collate
from student import chunked, objectives
from student.hidden import student_of
from student.loss import Loss
from student.objectives import cross_entropy
from student.recipe import FROM_TEXT, objective_of
from student.training_set import TrainingSet, smoothed_labels
from tasks.pronounce import Pronounce
from teacher.signal import ComputedSignal, Signal
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
    parts, _ = chunked.losses_in_chunks(model, batch, cross_entropy, signal, 72)
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


@pytest.fixture
def methods_lab(methods_run):
    return open_experiment(methods_run.config(), methods_run)


@pytest.mark.parametrize("name", ["related", "own", "smoothed"])
def test_every_kind_of_student_has_the_same_loss_in_chunks(name, methods_lab, monkeypatch):
    """One that matches hidden states, one whose own text a live teacher scores, and one of smoothed
    labels, whose distributions are computed a part at a time."""
    lab, found = methods_lab, []
    recipe = lab.plan.recipes["plain" if name == "smoothed" else name]
    for large in (10**6, 1):
        monkeypatch.setattr(chunked, "LARGE_VOCABULARY", large)
        data = training_set_of(lab, recipe, 0, CountedForward)
        if name == "smoothed":
            data = replace(data, signal=smoothed_labels(lab.task.vocabulary, 1.0))
        model = new_student(lab, recipe, data, 0).eval()
        loss = loss_of(lab, recipe, lab.config.students.training)
        step = data.at(student_of(model), 0, 0.0)
        signal = step.signal(collate(step.rows, np.arange(4), lab.task.pad))
        assert isinstance(signal, ComputedSignal) == (
            name == "smoothed" or (name == "own" and large == 1)
        )
        some = step.indices(0)
        value = loss(model, step, some, loss.normalizer(step.rows, some))
        value.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        found.append((value.detach(), step.flops, gradients))
    (whole, spent, one), (parts, charged, other) = found
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-5)
    assert charged == spent
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


MEASURE = """
import sys, torch
from models.language import LinearHead
from student import chunked, objectives
from student.training_set import smoothed_labels
from teacher.signal import ComputedSignal, Signal
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
targets = torch.zeros(M, dtype=torch.long)
signal = Signal(targets, teacher)
if sys.argv[3] == "smoothed":
    del teacher
    class Batch:
        pass
    batch = Batch()
    batch.targets = targets
    signal = smoothed_labels(V, 2.0)(batch)
if sys.argv[3] == "live":
    del teacher
    theirs = torch.nn.Linear(H, V, bias=False)
    def log_probs_of(states):
        with torch.no_grad():
            return torch.log_softmax(theirs(states), -1)
    signal = ComputedSignal(targets, torch.randn(M, H), log_probs_of)
objective(head(states[:1]), signal.part(0, 1)).sum().backward()  # libraries warm up
before = peak()
if in_chunks:
    whole = LinearHead(head.weight, head.bias, 1.0)
    chunked.chunked(objective, states, whole, signal, V).sum().backward()
else:
    objective(head(states), signal.whole()).sum().backward()
after = peak()
print((after - before) * 1024 / (2 * M * V * 4))
"""


def peak(name: str, how: str, signal: str = "stored") -> float:
    """Beside the teacher's stored float16, as a share of both logits in float32: 201 MB. Freed
    memory goes back at once, so that it is not the allocator that is measured."""
    command = [sys.executable, "-c", MEASURE, name, how, signal]
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
@pytest.mark.slow
@pytest.mark.parametrize("signal", ["smoothed", "live"])
def test_the_peak_is_as_low_for_distributions_that_are_computed(signal):
    """Label smoothing, and a teacher that scores the student's own text."""
    assert peak("forward_kl", "chunks", signal) < 1 / 3


@linux
def test_all_at_once_takes_more_than_both_logits():
    assert peak("forward_kl", "at once") > 1
