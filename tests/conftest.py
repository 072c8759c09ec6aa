"""One thread, no network, no leftovers: what every test may rely on."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> Path:
    """The real scripts on configs/tiny.yaml, trained and judged once for all tests."""
    import eval as judge
    import train

    runs = tmp_path_factory.mktemp("runs")
    assert train.main([str(ROOT / "configs" / "tiny.yaml"), "--runs", str(runs)]) == 0
    assert judge.main([str(runs / "tiny")]) == 0
    return runs / "tiny"
