"""The run folder: locks, damage, full disks."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import eval as judge
from configs.files import write_atomically
from experiment.checkpoints import load_checkpoint, save_checkpoint
from experiment.run import Run
from models.classifier import MlpClassifier, MlpConfig
from models.language import load_model, save_model
from teacher.shards import Record, write_shard
from tests.helpers import PART, ROOT, TINY, edited, tensor_hashes, train_tiny


def with_files_of_at_most(limit: int, *command: str) -> str:
    """The last line of the command if the operating system limits the size of files, as on a full
    disk; its exit code must be 2."""
    import resource

    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    return done.stderr.strip().splitlines()[-1]


def test_a_run_folder_of_another_config_is_rejected_and_kept(tiny_run, capsys):
    before = tensor_hashes(tiny_run)
    assert train_tiny(tiny_run.parent, "teacher.epochs=3") == 2
    assert "teacher.epochs: 5.0 there, 3.0 here" in capsys.readouterr().err
    assert tensor_hashes(tiny_run) == before


def test_missing_and_half_written_runs_are_rejected_by_name(copy, tmp_path, capsys):
    assert judge.main([str(tmp_path / "nowhere")]) == 2
    assert "no run folder" in capsys.readouterr().err
    (copy / "manifest.json").write_text((copy / "manifest.json").read_text()[:100])
    assert judge.main([str(copy)]) == 2
    assert "manifest.json is damaged" in capsys.readouterr().err
    (copy / "manifest.json").unlink()
    assert judge.main([str(copy)]) == 2
    assert "no " in capsys.readouterr().err


def test_an_unfinished_run_is_not_evaluated(copy, capsys):
    with edited(copy / "manifest.json") as manifest:
        manifest["finished"] = None
    assert judge.main([str(copy)]) == 2
    assert "is not finished; run train.py" in capsys.readouterr().err


def test_the_lock_of_a_killed_process_is_taken_over(copy, capsys):
    hold = (
        "import sys, time; from experiment.run import Run\n"
        f"with Run({str(copy)!r}).locked(): print('held', flush=True); time.sleep(600)"
    )
    other = subprocess.Popen([sys.executable, "-c", hold], cwd=ROOT, stdout=subprocess.PIPE)
    assert other.stdout.readline().strip() == b"held"
    assert train_tiny(copy.parent) == 2
    error = capsys.readouterr().err
    assert f"in use by process {other.pid} on {socket.gethostname()}" in error
    other.kill()
    other.wait()
    other.stdout.close()
    assert train_tiny(copy.parent) == 0


def test_two_runs_in_one_folder_are_rejected(copy, capsys):
    with Run(copy).locked():
        assert train_tiny(copy.parent) == 2
    assert f"in use by process {os.getpid()}" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit for the size of a file")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "stage", "overrides"),
    [
        (20_000, "teacher", ()),  # enough for the manifest, too little for a model
        (20_000, "teacher", ("workers=2", "controls=[baseline,second_teacher]", "verdicts=[]")),
        # enough for models
        (100_000, "outputs/data-logits", ()),
    ],
)
def test_a_full_disk_is_one_line_from_the_real_script(limit, stage, overrides, tmp_path):
    part = (*PART, *overrides, "recipes={distilled: {access: logits}}", "--runs", str(tmp_path))
    error = with_files_of_at_most(limit, str(ROOT / "train.py"), TINY, *part)
    assert error.startswith("error: ")
    assert "rerun the same command to resume" in error
    assert not (tmp_path / "tiny" / stage).exists() or not list(
        (tmp_path / "tiny" / stage).glob("[!.]*.arrow")
    )
    assert train_tiny(tmp_path, *part[:-2]) == 0


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit for the size of a file")
def test_an_evaluation_that_cannot_be_written_keeps_the_previous_one(copy):
    before = (copy / "eval.json").read_bytes()
    error = with_files_of_at_most(8_000, str(ROOT / "eval.py"), str(copy))
    assert error.startswith("error: ")
    assert "rerun the same command to resume" in error
    assert (copy / "eval.json").read_bytes() == before


def a_small_file(folder):
    write_atomically(folder / "name", "content")


def a_checkpoint(folder):
    save_checkpoint(folder, 1, {"w": torch.ones(3)}, {})


def a_model(folder):
    config = MlpConfig(pixels=4, hidden_size=2, num_hidden_layers=1, num_labels=2)
    save_model(MlpClassifier(config), None, folder / "name", "a card")


def a_shard(folder):
    record = Record(1, np.array([1, 2], np.uint8), 1, {})
    write_shard(folder, 0, {}, iter([record]), 1, lambda: 0.0)


@pytest.mark.parametrize("write", [a_small_file, a_checkpoint, a_model, a_shard])
def test_a_file_is_on_disk_before_it_gets_its_name(write, tmp_path, monkeypatch):
    """All of it: after a power cut it might otherwise be empty under the name of a complete one."""
    events, replace = [], os.replace

    def named(*paths):
        events.append("named")
        replace(*paths)

    monkeypatch.setattr(os, "fsync", lambda file: events.append(os.fstat(file).st_size))
    monkeypatch.setattr(os, "replace", named)
    write(tmp_path)
    *before, last = events
    assert last == "named"
    written = [file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()]
    assert sorted(before) == sorted(written)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lists what is mapped")
@pytest.mark.parametrize(
    ("write", "read"), [(a_checkpoint, load_checkpoint), (a_model, load_model)], ids=["c", "m"]
)
def test_a_file_that_was_read_can_be_removed_on_windows(write, read, tmp_path):
    """There a file that is still mapped cannot be."""
    write(tmp_path)
    folder = next(file for file in tmp_path.rglob("*.safetensors")).parent
    kept = read(folder)
    assert kept
    assert str(folder) not in Path("/proc/self/maps").read_text("utf-8")


def test_a_run_folder_may_be_moved(copy, tmp_path):
    moved = tmp_path / "elsewhere" / "renamed"
    moved.parent.mkdir()
    shutil.move(copy, moved)
    assert judge.main([str(moved), "--split", "validation"]) == 0


def test_a_run_of_another_schema_is_rejected_by_name(copy, capsys):
    with edited(copy / "manifest.json") as manifest:
        manifest["schema"] = 0
    assert judge.main([str(copy)]) == 2
    assert "has schema 0, this version reads" in capsys.readouterr().err
    assert train_tiny(copy.parent) == 2
    assert "has schema 0, this version reads" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("manifest.json", "[]"),
        ("manifest.json", "[" * 100_000),
        ("manifest.json", '{"schema": 4, "finished": "yes", "stages": {}}'),
        ("ledger.json", "{}"),
        ("ledger.json", '[{"stage": ["teacher"]}]'),
        ("metrics.jsonl", '{"stage": }\n'),
        ("metrics.jsonl", b"\xff\xfe}\n"),
        ("config.yaml", b"name: \xff"),
        ("config.yaml", "name: 2024-13-45"),
        ("config.yaml", "name: " + "[" * 2000),
    ],
)
def test_a_damaged_manifest_or_ledger_is_one_line(file, content, copy, capsys):
    content = content.encode() if isinstance(content, str) else content
    (copy / file).write_bytes(content)
    assert judge.main([str(copy)]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1
