"""Resuming: the same command ends in the same run, whatever interrupted it."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

import eval as judge
from experiment.run import Run
from tests.helpers import (
    PART,
    ROOT,
    TINY,
    edited,
    tensor_hashes,
    train_tiny,
    without_times,
)


def kill_at_random(command: list[str], kills: int, draw: random.Random, longest: float) -> int:
    """kill -9 the command up to `kills` times at random moments, then let it finish. Returns how
    often it was killed: a machine may be done before its time is up."""
    done = 0
    while done < kills:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            assert process.wait(timeout=draw.uniform(2, longest)) == 0
            return done
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            done += 1
    assert subprocess.run(command, capture_output=True).returncode == 0
    return done


def test_the_same_command_on_a_finished_run_changes_nothing(tiny_run):
    before = tensor_hashes(tiny_run)
    assert train_tiny(tiny_run.parent) == 0
    assert tensor_hashes(tiny_run) == before


@pytest.mark.parametrize(
    ("kills", "longest"), [(2, 12), pytest.param(50, 9, marks=pytest.mark.slow)]
)
def test_a_run_killed_anywhere_resumes_to_the_same_result(kills, longest, tiny_run, tmp_path):
    """Teacher, outputs, students and the evaluation; the result equals an uninterrupted one."""
    train_it = [sys.executable, str(ROOT / "train.py"), TINY, *PART, "checkpoint_seconds=0"]
    expected = json.loads((tiny_run / "eval.json").read_text())
    draw, killed, again = random.Random(kills), 0, 0
    while killed < kills:  # a run that is done before its time is up is followed by another
        run = tmp_path / str(again) / "tiny"
        left = max(1, kills - killed - 1)
        killed += kill_at_random([*train_it, "--runs", str(run.parent)], left, draw, longest)
        assert tensor_hashes(run).items() <= tensor_hashes(tiny_run).items()
        assert len(tensor_hashes(run)) >= 10
        killed += kill_at_random([sys.executable, str(ROOT / "eval.py"), str(run)], 1, draw, 6)
        found = json.loads((run / "eval.json").read_text())
        for student in ("distilled", "states"):
            for group in ("quality", "fidelity"):
                for name, metric in found["students"][student][group].items():
                    there = expected["students"][student][group][name]["per_seed"]
                    assert metric["per_seed"] == there[:1]
        again += 1


@pytest.mark.parametrize("script", [pytest.param("train.py", marks=pytest.mark.slow), "eval.py"])
def test_the_same_command_gives_the_same_results_twice(script, copy, tiny_run, tmp_path):
    """In another process, where strings have other hashes."""
    fresh = {**os.environ, "PYTHONHASHSEED": "7"}
    run = copy
    if script == "train.py":
        run = tmp_path / "again" / "tiny"
        command = [sys.executable, ROOT / script, TINY, "--runs", run.parent]
        subprocess.run(command, env=fresh, capture_output=True, check=True)
    command = [sys.executable, ROOT / "eval.py", run]
    subprocess.run(command, env=fresh, capture_output=True, check=True)
    assert tensor_hashes(run) == tensor_hashes(tiny_run)
    first, second = (
        without_times(json.loads((folder / "eval.json").read_text("utf-8")))
        for folder in (tiny_run, run)
    )
    assert first == second


def test_a_run_resumed_on_another_machine_names_both(copy):
    """Otherwise a check would expect equal bits."""
    with edited(copy / "manifest.json") as manifest:
        manifest["environment"]["cpu"] = "another"
    shutil.rmtree(copy / "students" / "baseline" / "seed-1")
    assert train_tiny(copy.parent) == 0
    found = Run.finished(copy).manifest
    assert found["environment"]["cpu"] != "another"
    assert [e["cpu"] for e in found["earlier_environments"]] == ["another"]


def test_clocks_that_jump_change_only_the_times(tiny_run, tmp_path, monkeypatch):
    draw, clock = random.Random(0), time.perf_counter

    def jumping():
        return clock() + draw.uniform(-1e6, 1e6)

    monkeypatch.setattr(time, "perf_counter", jumping)
    monkeypatch.setattr(time, "time", jumping)
    assert train_tiny(tmp_path, *PART, "recipes={distilled: {access: logits}}") == 0
    assert tensor_hashes(tmp_path / "tiny").items() <= tensor_hashes(tiny_run).items()


def test_a_deleted_stage_is_made_again_bit_for_bit(copy, tiny_run, capsys):
    """As the errors about damaged files advise."""
    for stage in ("teacher", "students/baseline/seed-1", "outputs/data-logits"):
        shutil.rmtree(copy / stage)
    assert train_tiny(copy.parent) == 0
    assert f"{copy / 'teacher'} is missing: it is made again" in capsys.readouterr().out
    assert tensor_hashes(copy) == tensor_hashes(tiny_run)
    assert judge.main([str(copy), "--split", "validation"]) == 0


def test_a_run_started_on_other_rows_is_rejected(copy, capsys):
    with edited(copy / "manifest.json") as manifest:
        manifest["data"]["rows"] = "0" * 64
    assert train_tiny(copy.parent) == 2
    assert "started on other rows" in capsys.readouterr().err
