"""Settings of a training that change how its steps are computed: half precision, activation
checkpointing, torch.compile."""

import shutil

import pytest
import torch

from experiment.cost import TrainingFlops
from models.language import build_model, initialise, load_model
from student import chunked
from tests.helpers import fit


def losses(run, stage):
    return [line["loss"] for line in run.log_of(stage)] or [
        line["loss"] for line in run.metrics() if line["stage"] == stage
    ]


@pytest.fixture
def logged(lab):
    """Every step is logged."""
    assert lab.config.log_every == 1
    return lab


@pytest.mark.parametrize("in_chunks", [False, True])
def test_autocast_is_in_half_precision_and_learns_the_same(in_chunks, logged, monkeypatch):
    if in_chunks:
        monkeypatch.setattr(chunked, "LARGE_VOCABULARY", 1)
    types = []
    monkeypatch.setattr(
        torch.nn.Linear, "forward", watched(torch.nn.Linear.forward, types, lambda out: out.dtype)
    )
    fit(logged, steps=6, stage="whole")
    assert set(types) == {torch.float32}
    types.clear()
    fit(logged, steps=6, stage="half", autocast="bfloat16")
    assert torch.bfloat16 in types
    whole, half = losses(logged.run, "whole"), losses(logged.run, "half")
    assert whole != half
    assert half == pytest.approx(whole, rel=0.02)
    saved = load_model(logged.run.folder / "half")
    assert saved.dtype == torch.float32  # as its moments were


def watched(function, seen, of):
    def call(*arguments, **options):
        output = function(*arguments, **options)
        seen.append(of(output))
        return output

    return call


def test_recomputed_activations_give_the_same_weights_and_are_charged(logged):
    plain, made = fit(logged, steps=3, stage="plain")
    again, remade = fit(logged, steps=3, stage="again", activation_checkpointing=True)
    assert made["sha256"] == remade["sha256"]
    assert 1.1 < again["flops"] / plain["flops"] < 4 / 3  # a third forward pass, without the head


def test_fused_attention_computes_its_scores_again_in_the_backward_pass(lab):
    settings = lab.config.teacher.model
    fused = build_model(settings.model_copy(update={"attention": "sdpa"}), lab.task)
    plain = build_model(settings, lab.task)
    length, width = 16, settings.hidden_size
    scores = settings.num_hidden_layers * 2 * length * length * width
    found = TrainingFlops(fused).of_row(length) - TrainingFlops(plain).of_row(length)
    assert found == scores


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++ on a CPU")
def test_a_compiled_model_learns_the_same_and_is_saved_under_its_own_names(logged):
    fit(logged, steps=3, stage="plain")
    fit(logged, steps=3, stage="compiled", compile=True)
    assert losses(logged.run, "compiled") == pytest.approx(losses(logged.run, "plain"), rel=1e-4)
    names = initialise(build_model(logged.config.teacher.model, logged.task), 0).state_dict()
    assert load_model(logged.run.folder / "compiled").state_dict().keys() == names.keys()
