"""The log: metrics.jsonl and the learning curve."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from configs.files import sha256_of_json
from configs.schema import LabError
from experiment.log import TrainingLog
from experiment.processes import new_accelerator
from experiment.reading import read_config
from models.language import build_model, initialise, load_model
from models.rows import collate
from tests.helpers import TINY, fit


def test_the_validation_loss_is_that_of_the_answer_tokens_whatever_was_trained(lab):
    """With a divergence or prompts in the loss, its exp would not be a perplexity."""
    fit(lab, steps=3, prompt_weight=1.0)
    model = load_model(lab.run.teacher)
    batch = collate(lab.validation, np.arange(len(lab.validation)), 0)
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(
            model(batch.input_ids).logits[batch.counted], batch.targets
        )
    *_, logged = (line["validation_nll"] for line in lab.run.metrics())
    assert logged == pytest.approx(expected.item(), rel=1e-5)


def test_lines_of_a_training_fit_a_terminal_and_name_their_model(lab, capsys):
    log = TrainingLog(
        lab.run, "students/second_teacher/seed-123", lab.task, lab.validation, 99_999, 0, 0.0
    )
    model = initialise(build_model(lab.config.teacher.model, lab.task), 0)
    log.started -= 10.0
    log.record(1, 1.0, model, torch.tensor(12.5), torch.tensor(1.0), 1e12, 10**6)
    log.close()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("second_teacher/seed-123")
    assert "     1/99999 loss 12.5000" in line
    assert " validation " in line
    assert len(line) <= 80


def test_the_log_of_a_killed_stage_is_cut_back_to_its_checkpoint(lab):
    for step in (1, 2, 3):
        lab.run.log("teacher", step=step, loss=1.0)
    with open(lab.run.checkpoints("teacher") / "metrics.jsonl", "a") as file:
        file.write('{"stage": "teacher", "st')
    expected = sha256_of_json(lab.run.log_of("teacher")[:2])
    with pytest.raises(LabError, match="was changed after it was written"):
        lab.run.forget_log("teacher", 2, sha256_of_json([]))
    lab.run.forget_log("teacher", 2, expected)
    assert [line["step"] for line in lab.run.log_of("teacher")] == [1, 2]
    assert json.loads((lab.run.folder / "ledger.json").read_text()) == []


class Recorder(GeneralTracker):
    """A tracker as accelerate's interface asks for one."""

    name, requires_logging_directory = "recorder", False

    def __init__(self):
        super().__init__()
        self.seen = []

    tracker = property(lambda self: self.seen)

    def store_init_configuration(self, values):
        pass

    def log(self, values, step=None, **_):
        self.seen.append((step, values))


def test_trackers_get_every_line_of_the_log(lab):
    recorder = Recorder()
    accelerator = Accelerator(cpu=True, log_with=recorder)
    accelerator.init_trackers("a run")
    fit(dataclasses.replace(lab, accelerator=accelerator), steps=3)
    lines = [line for line in lab.run.metrics() if line["stage"] == "teacher"]
    assert [step for step, _ in recorder.seen] == [line["step"] for line in lines] == [1, 2, 3]
    for (_, values), line in zip(recorder.seen, lines, strict=True):
        assert values["teacher/loss"] == line["loss"]
        assert values["teacher/grad_norm"] == line["grad_norm"]


def test_a_tracker_that_is_not_installed_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = read_config(TINY, ["trackers=[wandb]"])
    with pytest.raises(LabError, match="trackers: wandb is not installed; pip install wandb"):
        new_accelerator(config, tmp_path)
