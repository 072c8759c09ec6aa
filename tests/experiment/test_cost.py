"""The cost ledger."""

import sys
from itertools import count
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from configs.schema import Cost
from experiment import cost, stages
from experiment.cost import CountedForward, Stopwatch, TrainingFlops
from experiment.experiment import Experiment
from experiment.run import Run
from models.language import (
    build_model,
    parameter_count,
)
from models.rows import batch_order, collate
from tests.helpers import fit


def test_the_ledger_has_the_time_of_writing_and_the_bytes_per_token(methods_run):
    for name in ("own", "mixed"):
        cost = methods_run.cost_of(f"students/{name}/seed-0")
        assert 0 < cost["writing_seconds"] < cost["seconds"]
        share = cost["writing_seconds"] / cost["seconds"]
        assert cost["writing_share"] == pytest.approx(share, abs=2e-3)
    assert "writing_seconds" not in methods_run.cost_of("students/plain/seed-0")
    bytes_per_token = {
        stage: methods_run.cost_of(f"outputs/{stage}")["bytes_per_token"]
        for stage in ("data-logits", "data-top_k-5", "assistant-data-sampled-6")
    }
    assert bytes_per_token["data-logits"] > 2 * 72
    assert bytes_per_token["data-top_k-5"] < 60
    assert bytes_per_token["assistant-data-sampled-6"] < 60


def test_flops_are_those_that_torch_counts_over_the_whole_step(lab):
    from torch.utils.flop_counter import FlopCounterMode

    charged, _ = fit(lab, steps=3)
    model = build_model(lab.config.teacher.model, lab.task)
    order = batch_order(lab.rows.lengths, 32, 0)
    with FlopCounterMode(display=False) as counter:
        for step in range(3):
            ids = collate(lab.rows, order(step), 0).input_ids
            model(ids, use_cache=False).logits.sum().backward()
    assert charged["flops"] == counter.get_total_flops()
    # and differ from 6ND: toy models are mostly attention and vocabulary
    assert TrainingFlops(model).of_row(16) == pytest.approx(
        6 * 16 * parameter_count(model), rel=0.3
    )


def test_workers_side_by_side_pay_for_the_machine_once():
    """Two workers for an hour: each has half of its price and of what its meter shows."""
    clock, meter = count(0, 3600), count(0, 1000)
    with (
        patch.object(cost, "peak_memory", lambda: 7 * 2**20),
        patch.object(cost.time, "perf_counter", lambda: float(next(clock))),
        patch.object(cost, "read_energy", lambda: float(next(meter))),
    ):
        alone = Stopwatch(Cost(price_per_hour=0.4), 1).read(0.0)
        workers = [Stopwatch(Cost(price_per_hour=0.4), 1, 0.5).read(0.0) for _ in range(2)]
    assert alone["money"] == pytest.approx(0.4)
    assert sum(worker["money"] for worker in workers) == pytest.approx(alone["money"])
    assert alone["joules"] == sum(worker["joules"] for worker in workers) == 1000
    assert alone["seconds"] == workers[0]["seconds"] == 3600
    assert alone["peak_memory_mb"] == 7


def test_without_a_meter_a_worker_pays_for_its_threads():
    with patch.object(cost, "read_energy", lambda: None):
        watch = Stopwatch(Cost(watts_per_thread=5), threads=3, share=0.25)
        assert watch.joules(10.0)[0] == 5 * 3 * 10


@pytest.mark.parametrize("workers", [1, 2])
def test_a_stage_is_charged_its_share_of_the_machine(workers, lab):
    config = lab.config.model_copy(update={"workers": workers})
    opened = patch.object(stages, "open_experiment", lambda *_: lab)
    with opened, patch.object(Run, "reload", lambda self: self):
        stages.open_worker(config, lab.run.folder)
    assert isinstance(stages.worker_experiment, Experiment)
    assert stages.worker_experiment.stopwatch().share == 1 / workers
    assert lab.stopwatch().share == 1


def test_a_counted_model_begins_with_no_flops_and_adds_up(lab):
    model = build_model(lab.config.teacher.model, lab.task)
    counted, ids = CountedForward(model), torch.zeros((2, 9), dtype=torch.long)
    assert counted.flops == 0
    counted(ids, use_cache=False)
    once = counted.flops
    counted(ids, use_cache=False)
    assert counted.flops == 2 * once > 0


def test_counting_leaves_no_gradient_in_the_model_that_is_trained(lab, monkeypatch):
    """It would be added to that of the next step."""
    monkeypatch.setattr(cost, "TRAINING_FLOPS", {})  # nothing was counted before
    model = build_model(lab.config.teacher.model, lab.task)
    assert TrainingFlops(model).of_row(16) > 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_load_of_others_is_what_this_process_did_not_use():
    """Of 30 s of work on both cores, 12 s were ours and those of workers that ended."""
    with patch.object(cost, "cpu_seconds", lambda: (130.0, 62.0)):
        assert cost.load_of_others((100.0, 50.0)) == pytest.approx(0.6)
        assert cost.load_of_others((100.0, 20.0)) == 0.0
    before = cost.cpu_seconds()
    sum(i * i for i in range(300_000))
    total, own = (now - then for now, then in zip(cost.cpu_seconds(), before, strict=True))
    assert own > 0
    assert total >= 0


def test_what_workers_used_is_not_known_everywhere(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cost.load_of_others((0.0, 0.0), workers=2) is None
    assert cost.load_of_others((0.0, 0.0), workers=1) is not None


def test_energy_is_read_in_joules(tmp_path, monkeypatch):
    """A CPU counts microjoules, a GPU millijoules; without a counter there is no figure."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(cost, "RAPL", tmp_path / "energy_uj")
    assert cost.read_energy() is None
    (tmp_path / "energy_uj").write_text("2500000\n", "utf-8")
    assert cost.read_energy() == 2.5
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    counter = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda device: f"device {device}",
        nvmlDeviceGetTotalEnergyConsumption={"device 1": 4000}.__getitem__,
    )
    monkeypatch.setitem(sys.modules, "pynvml", counter)
    assert cost.read_energy() == 4.0
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    assert cost.read_energy() is None


@pytest.mark.parametrize(("system", "bytes_each"), [("linux", 1024), ("darwin", 1)])
def test_the_peak_of_a_process_is_in_bytes(system, bytes_each, monkeypatch):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=5_000))
    monkeypatch.setattr(sys, "platform", system)
    assert cost.peak_memory() == 5_000 * bytes_each


def test_the_peak_of_a_gpu_is_that_of_its_own_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 123)
    assert cost.peak_memory() == 123
