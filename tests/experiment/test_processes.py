"""Several processes that train one model."""

import dataclasses
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

import train
from configs.schema import LabError
from experiment import processes
from experiment.check import losses_of
from experiment.collecting import sources
from experiment.run import Run
from teacher import outputs
from tests.helpers import ROOT, TINY, fit


def kill_at_a_checkpoint(command: list[str], checkpoints: Path) -> None:
    """kill -9 the command and all its processes once a checkpoint is there."""
    started = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while started.poll() is None and not list(checkpoints.glob("step-*0.*")):
        time.sleep(0.05)
    assert started.poll() is None, "it was over before it could be killed"
    launcher = psutil.Process(started.pid)  # its processes have sessions of their own
    family = [launcher, *launcher.children(recursive=True)]
    for process in family:
        process.kill()
    psutil.wait_procs(family, timeout=10)
    started.wait()


def test_outputs_are_finished_when_all_processes_have_written_their_shards(lab, monkeypatch):
    """Here the other process writes its own while this one waits."""
    fit(lab, steps=1)
    monkeypatch.setattr(outputs, "SHARD_ROWS", 100)
    make_outputs, written = train.make_outputs, []

    def here(*arguments):
        make_outputs(*arguments)
        written.append(arguments)

    def others():
        if len(written) == 1:
            *arguments, process, processes = written[0]
            assert (process, processes) == (0, 2)
            make_outputs(*arguments, 1, processes)

    monkeypatch.setattr(train, "make_outputs", here)
    two = SimpleNamespace(
        num_processes=2, process_index=0, is_main_process=True, wait_for_everyone=others,
        device=lab.accelerator.device,
    )  # fmt: skip
    recipe = lab.config.recipes["distilled"]
    stage = lab.plan.request(recipe).stage
    shared = dataclasses.replace(lab, accelerator=two)
    with sources(shared) as open_source:
        train.produce_outputs(shared, stage, recipe, open_source, fresh=True)
    assert lab.run.manifest["stages"][stage]["rows"] == len(lab.rows) > 200


def test_several_processes_are_not_launched_beside_workers(tmp_path, monkeypatch, capsys):
    two = SimpleNamespace(num_processes=2, is_main_process=True)
    monkeypatch.setattr(processes, "Accelerator", lambda **_: two)
    assert train.main([TINY, "workers=2", "--runs", str(tmp_path)]) == 2
    assert "2 processes were launched and workers is 2" in capsys.readouterr().err


def test_a_batch_too_small_for_all_processes_is_refused(lab):
    many = SimpleNamespace(num_processes=1000, device=lab.accelerator.device)
    with pytest.raises(LabError, match="rows cannot be shared by 1000 processes; launch fewer"):
        fit(dataclasses.replace(lab, accelerator=many), steps=1)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("float64", 1e-9)])
def test_several_processes_train_the_same_model_and_resume_as_fewer_or_more(
    precision, tolerance, tmp_path
):
    """The same global batch on 1, on 2, from 2 to 1 and from 1 to 3 processes."""
    arguments = [
        str(ROOT / "configs" / "trace-float64.yaml"), f"precision={precision}", "teacher.epochs=2",
        "students.budget=0.5", "checkpoint_seconds=0", "threads=1",
    ]  # fmt: skip
    script = str(ROOT / "train.py")

    def command(processes: int, runs: str) -> list[str]:
        launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes"]
        launch = [*launch, str(processes)] if processes > 1 else []
        return [sys.executable, *launch, script, *arguments, "--runs", str(tmp_path / runs)]

    for runs, before, after in (("one", 1, 1), ("two", 2, 2), ("fewer", 2, 1), ("more", 1, 3)):
        if before != after:
            checkpoints = tmp_path / runs / "trace-float64" / "checkpoints" / "teacher"
            kill_at_a_checkpoint(command(before, runs), checkpoints)
            assert list(checkpoints.glob("step-*"))
        done = subprocess.run(command(after, runs), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    first, *others = (
        losses_of(Run.finished(tmp_path / runs / "trace-float64"))
        for runs in ("one", "two", "fewer", "more")
    )
    for trace in others:
        assert trace.keys() == first.keys()
        for stage, steps in first.items():
            assert trace[stage] == pytest.approx(steps, abs=tolerance)
