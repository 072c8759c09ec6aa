"""Checkpoints: written when due, skipped when damaged."""

import dataclasses
import errno
import os

import torch

from experiment import training_state
from experiment.checkpoints import load_checkpoint, save_checkpoint
from tests.helpers import PART, fit, train_tiny


def test_a_failed_write_is_one_line_and_loses_no_work(tmp_path, capsys, monkeypatch):
    """A full disk, a read-only folder: the command resumes once there is room."""
    import experiment.checkpoints

    written = []

    def full(tensors, file, metadata):
        if len(written) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        written.append(file)
        return save_file(tensors, file, metadata)

    save_file = experiment.checkpoints.save_file
    monkeypatch.setattr(experiment.checkpoints, "save_file", full)
    assert train_tiny(tmp_path, *PART, "checkpoint_seconds=0") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert "No space left on device" in error
    assert len(list((tmp_path / "tiny" / "checkpoints" / "teacher").glob("step-*"))) == 2
    (tmp_path / "file").write_text("not a folder")
    assert train_tiny(tmp_path / "file") == 2
    assert "file" in capsys.readouterr().err


def test_checkpoints_are_written_by_step_too(lab, monkeypatch):
    """For machines whose clock is no measure of work, such as one that sleeps."""
    config = lab.config.model_copy(update={"checkpoint_seconds": 1e9, "checkpoint_steps": 3})
    saved = []
    save = training_state.checkpoint

    def noted(path, step, *rest):
        saved.append(step)
        save(path, step, *rest)

    monkeypatch.setattr(training_state, "checkpoint", noted)
    fit(dataclasses.replace(lab, config=config), steps=12)
    assert saved == [3, 6, 9]  # after the last step the model itself is saved


def test_a_torn_checkpoint_is_skipped_with_a_message(tmp_path, capsys):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, {"w": torch.full((3,), float(step))}, {"flops": step})
    files = sorted(tmp_path.glob("step-*"))
    assert len(files) == 2
    files[-1].write_bytes(files[-1].read_bytes()[:-4])
    tensors, meta = load_checkpoint(tmp_path)
    assert meta == {"step": 2, "flops": 2}
    assert tensors["w"].tolist() == [2.0] * 3
    assert "is damaged" in capsys.readouterr().out
    files[0].write_bytes(b"")
    assert load_checkpoint(tmp_path) is None
    assert "every checkpoint in" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "nowhere") is None
    assert capsys.readouterr().out == ""
