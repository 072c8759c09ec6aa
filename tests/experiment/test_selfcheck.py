"""The self-check finds silent errors of distillation code."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

import eval as judge
from experiment.command import command_line
from models.rows import weight_of
from student.loss import Loss
from teacher.shards import Outputs
from tests.helpers import edit_log, edited, train_tiny


def findings(folder, capsys):
    code = judge.main([str(folder), "--selfcheck"])
    return code, capsys.readouterr().out


def test_a_sound_run_passes_all_checks(methods_run, tiny_run, capsys):
    for folder in (methods_run.folder, tiny_run):
        code, output = findings(folder, capsys)
        assert code == 0, output
        assert "[FAIL]" not in output
        assert output.splitlines()[-1].startswith("all checks passed (")
        assert "the teacher as its own student: KL 0, agreement 1" in output
    for name in ("distilled", "states", "top", "baseline", "shuffled", "smoothed"):
        assert f"{name}: first loss" in output


def test_outputs_read_by_position_are_found(methods_run, capsys, monkeypatch):
    """Planted: each row gets the outputs of the first row of its lengths."""
    pieces = Outputs.pieces

    def by_position(self, column, batch):
        lengths = [*zip(self.rows.lengths, self.rows.prompt_lengths, strict=True)]
        first = [lengths.index(lengths[i]) for i in batch.indices]
        return pieces(self, column, replace(batch, indices=np.array(first)))

    monkeypatch.setattr(Outputs, "pieces", by_position)
    code, output = findings(methods_run.folder, capsys)
    assert code == 1
    assert "[FAIL] outputs/data-logits" in output


def test_a_teacher_exchanged_after_its_outputs_is_found(tiny_run, tmp_path, capsys):
    copy = Path(shutil.copytree(tiny_run, tmp_path / "tiny"))
    shutil.rmtree(copy / "teacher")
    shutil.copytree(copy / "second_teacher", copy / "teacher")
    capsys.readouterr()
    assert judge.main([str(copy), "--selfcheck"]) == 2
    assert "teacher is not the model that this run trained" in capsys.readouterr().err


def test_a_loss_of_another_scale_is_found(tiny_run, tmp_path, capsys):
    copy = Path(shutil.copytree(tiny_run, tmp_path / "tiny"))

    def double(lines):
        line = next(line for line in lines if line["stage"] == "students/top/seed-0")
        line["loss"] *= 2

    edit_log(copy, double)
    code, output = findings(copy, capsys)
    assert code == 1
    assert "[FAIL] top: first loss" in output


def test_a_mean_of_means_is_found(tiny_run, capsys, monkeypatch):
    """Planted: every part of a step is divided by its own weight."""
    loss = Loss.__call__

    def by_own_weight(self, model, data, indices, normalizer, progress=0.0):
        own = weight_of(data.rows, indices, self.prompt_weight)
        return loss(self, model, data, indices, own, progress) * own[1] / normalizer[1]

    monkeypatch.setattr(Loss, "__call__", by_own_weight)
    code, output = findings(tiny_run, capsys)
    assert code == 1
    assert "[FAIL] gradients" in output


def test_a_shuffled_teacher_that_helps_is_found(tiny_run, tmp_path, capsys):
    """As much as the correct outputs: then their content did not matter."""
    copy = Path(shutil.copytree(tiny_run, tmp_path / "tiny"))
    metric = {"mean": 0.6, "ci95": [0.59, 0.61], "per_seed": [0.6, 0.6]}
    with edited(copy / "eval.json") as result:
        for entry in (result["students"]["distilled"], result["controls"]["shuffled"]):
            entry["fidelity"]["sequence_agreement"] = metric
    code, output = findings(copy, capsys)
    assert code == 1
    assert "[FAIL] shuffled: 60.0 % of the teacher's answers, against 60.0 % of distilled" in output


def test_a_student_with_dropout_raises_no_false_alarm(tmp_path, capsys):
    """Its first loss is random."""
    model = {"architecture": "gpt2", "settings": {"resid_pdrop": 0.1}}
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    overrides = (
        "seeds=[0]", "controls=[]", "verdicts=[]", "recipes={plain: {access: logits}}",
        f"students.model={json.dumps(model | shape)}",
    )  # fmt: skip
    assert train_tiny(tmp_path, *overrides) == 0
    assert judge.main([str(tmp_path / "tiny")]) == 0
    code, output = findings(tmp_path / "tiny", capsys)
    assert code == 0, output
    assert "[--]   plain: first loss: it has dropout" in output


def test_a_weak_student_raises_no_false_alarm(tiny_run, tmp_path, capsys):
    """Lower, but within the noise of few rows: that cannot be decided."""
    copy = Path(shutil.copytree(tiny_run, tmp_path / "tiny"))
    with edited(copy / "eval.json") as result:
        for name, mean in (("distilled", 0.06), ("baseline", 0.06), ("low_data", 0.06)):
            entry = {**result["students"], **result["controls"]}[name]
            metric = {"mean": mean, "ci95": [mean - 0.05, mean + 0.05], "per_seed": [mean, mean]}
            entry["fidelity"]["sequence_agreement"] = metric
        weak = {"mean": 0.02, "ci95": [0.0, 0.04], "per_seed": [0.02, 0.02]}
        result["controls"]["shuffled"]["fidelity"]["sequence_agreement"] = weak
    code, output = findings(copy, capsys)
    assert code == 0, output
    assert "lower, but the intervals overlap; more held-out rows would decide it" in output


def test_a_run_is_evaluated_before_it_is_checked_for_silent_errors(copy, capsys):
    (copy / "eval.json").unlink()
    assert judge.main([str(copy), "--selfcheck"]) == 2
    command = command_line("eval.py", copy)
    assert f"{copy} is not evaluated yet; run {command} first" in capsys.readouterr().err
