"""One thread, no network, no leftovers: what every test may rely on."""

import json
import os
import shutil
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis
import pytest
import torch
from accelerate import Accelerator

import eval as judge
from experiment.experiment import Experiment, data_of, open_experiment, splits_of
from experiment.reading import read_config
from experiment.run import Run
from tests.helpers import METHODS, ROOT, TINY, train_tiny

torch.set_num_threads(1)
os.fsync = lambda descriptor: None  # a test need not survive a power cut
hypothesis.settings.register_profile("same", derandomize=True, database=None)
hypothesis.settings.load_profile("same")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items) -> None:
    """One process trains `methods_run`, which is large, for all tests that read it."""
    for item in items:
        if "methods_run" in item.fixturenames:
            item.add_marker(pytest.mark.xdist_group("methods"))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> Path:
    """The real scripts on configs/tiny.yaml, trained and evaluated once for all tests."""
    runs = tmp_path_factory.mktemp("runs")
    assert train_tiny(runs) == 0
    assert judge.main([str(runs / "tiny")]) == 0
    return runs / "tiny"


@pytest.fixture
def copy(tiny_run, tmp_path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(tiny_run, tmp_path / "tiny"))


@pytest.fixture(scope="session")
def methods_run(tmp_path_factory) -> Run:
    """Every way of composing a method, in one run."""
    runs = tmp_path_factory.mktemp("methods")
    assert train_tiny(runs, *METHODS) == 0
    assert judge.main([str(runs / "methods")]) == 0
    return Run.finished(runs / "methods")


@pytest.fixture
def lab(tmp_path) -> Experiment:
    """The experiment of configs/tiny.yaml, opened but not trained."""
    config = read_config(TINY, ["log_every=1"])
    (tmp_path / "run").mkdir()
    run = Run.open(tmp_path / "run", config, {})
    lab = open_experiment(config, run, Accelerator(cpu=True))
    run.manifest |= {"data": data_of(lab), "splits": splits_of(lab)}
    return lab


@pytest.fixture
def scaling_result() -> dict:
    return json.loads((ROOT / "results" / "scaling.json").read_text(encoding="utf-8"))
