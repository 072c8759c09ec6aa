"""Every file of a run is bound to the run: what was exchanged, edited or damaged is never used."""

import json
import shutil

import pytest

import eval as judge
import train
from configs.schema import LabError
from tests.helpers import edited, fit, tensor_hashes, train_tiny


def one_line(capsys) -> str:
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    return error


def forget(run, *stages) -> None:
    """As if these stages had not been reached."""
    with edited(run / "manifest.json") as manifest:
        manifest["finished"] = None
        for stage in stages:
            del manifest["stages"][stage]
            shutil.rmtree(run / stage)


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("config.json", {"hidden_act": "gelu"}),
        ("config.json", {"rms_norm_eps": 0.5}),
        ("config.json", {"transformers_weights": "other.safetensors"}),
        ("generation_config.json", {"temperature": 0.5}),
        ("tokenizer_config.json", {"padding_side": "left"}),
    ],
)
@pytest.mark.parametrize("stage", ["teacher", "students/distilled/seed-1"])
def test_an_edited_file_of_a_model_is_rejected_by_name(name, edit, stage, copy, capsys):
    file = copy / stage / name
    content = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps(content | edit), "utf-8")
    shutil.copy(copy / stage / "model.safetensors", copy / "other.safetensors")
    assert judge.main([str(copy), "--split", "validation"]) == 2
    assert f"{name} is not the one that this run saved" in one_line(capsys)


def test_a_tokenizer_with_two_tokens_exchanged_is_rejected(copy, capsys):
    file = copy / "teacher" / "tokenizer.json"
    content = json.loads(file.read_text("utf-8"))
    words = content["model"]["vocab"]
    words["AA"], words["AE"] = words["AE"], words["AA"]
    file.write_text(json.dumps(content), "utf-8")
    assert judge.main([str(copy), "--ask", "lab"]) == 2
    assert "tokenizer.json is not the one that this run saved" in one_line(capsys)


@pytest.mark.parametrize("stage", ["outputs/teacher-text-train", "students/distilled/seed-0"])
def test_a_teacher_exchanged_after_its_training_teaches_nobody(stage, copy, capsys):
    """Neither outputs nor students are made with weights that the manifest does not know."""
    found = [s for s in tensor_hashes(copy) if s.startswith(stage)]
    forget(copy, *found)
    weights = "model.safetensors"
    shutil.copy(copy / "second_teacher" / weights, copy / "teacher" / weights)
    if stage.startswith("students"):  # trains from stored outputs: the teacher is not read
        assert train_tiny(copy.parent) == 0
        assert judge.main([str(copy)]) == 2
    else:
        assert train_tiny(copy.parent) == 2
    assert "teacher is not the model that this run trained" in one_line(capsys)


def test_a_checkpoint_of_another_training_is_rejected(lab):
    lab = train.replace(lab, config=lab.config.model_copy(update={"checkpoint_seconds": 0}))
    fit(lab, stage="first", steps=6)
    kept = lab.run.checkpoints("second")

    class Stop(Exception):
        pass

    def stop(logits, signal, progress=0.0):
        if any(kept.glob("step-*")):
            raise Stop
        return logits.logsumexp(-1)

    with pytest.raises(Stop):
        fit(lab, objective=stop, stage="second", steps=6)
    kept.rename(lab.run.checkpoints("third"))
    with pytest.raises(LabError, match=r"belongs to another training .*stage"):
        fit(lab, stage="third", steps=6)


def test_a_shard_of_other_outputs_is_set_aside_and_made_again(copy, capsys):
    """Same name, same rows, another content: the name is bound to what made it."""
    stage = "outputs/teacher-text-train"
    stage = next(s for s in tensor_hashes(copy) if s.startswith(stage))
    before = {file.name: file.read_bytes() for file in (copy / stage).glob("shard-*")}
    other = next((copy / "outputs" / "data-logits").glob("shard-*"))
    name = next(iter(before))
    with edited(copy / "manifest.json") as manifest:
        manifest["finished"] = None
        del manifest["stages"][stage]
    shutil.copy(other, copy / stage / name)
    assert train_tiny(copy.parent) == 0
    assert "set aside, and made again" in capsys.readouterr().out
    assert {file.name: file.read_bytes() for file in (copy / stage).glob("shard-*")} == before


def edit_ledger(run):
    rows = json.loads((run / "ledger.json").read_text("utf-8"))
    rows[0]["flops"] *= 1.25
    (run / "ledger.json").write_text(json.dumps(rows), "utf-8")
    return "the cost of teacher was changed"


def edit_config(run):
    text = (run / "config.yaml").read_text("utf-8")
    (run / "config.yaml").write_text(text.replace("limit: 600", "limit: 500"), "utf-8")
    return "config.yaml is not the config that this run was started with"


def edit_log_line(run):
    text = (run / "metrics.jsonl").read_text("utf-8")
    (run / "metrics.jsonl").write_text(text.replace('"step": 10,', '"step": 11,', 1), "utf-8")
    return "the log of teacher was changed"


def edit_manifest(run):
    content = json.loads((run / "manifest.json").read_text("utf-8"))
    (run / "manifest.json").write_text(json.dumps(content | {"heldout_reads": 0}), "utf-8")
    return "manifest.json was changed after it was written"


def other_rows(run):
    with edited(run / "manifest.json") as manifest:
        manifest["splits"]["heldout"] = "0" * 64
    return "the heldout rows are not those"


@pytest.mark.parametrize(
    "edit", [edit_ledger, edit_config, edit_log_line, edit_manifest, other_rows]
)
def test_an_edited_record_of_a_run_is_rejected_by_name(edit, copy, capsys):
    before = (copy / "eval.json").read_bytes()
    expected = edit(copy)
    assert judge.main([str(copy)]) == 2
    assert expected in one_line(capsys)
    assert (copy / "eval.json").read_bytes() == before


def test_a_config_written_differently_is_the_same_config(copy):
    file = copy / "config.yaml"
    file.write_text("# a note\r\n" + file.read_text("utf-8").replace("\n", "\r\n"), "utf-8")
    assert judge.main([str(copy), "--split", "validation"]) == 0


@pytest.mark.parametrize("option", ["--selfcheck", "--check"])
def test_an_edited_evaluation_is_not_trusted(option, copy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(judge, "RESULTS", tmp_path)
    shutil.copy(copy / "eval.json", tmp_path / "tiny.json")
    result = json.loads((copy / "eval.json").read_text("utf-8"))
    values = result["students"]["distilled"]["fidelity"]["sequence_agreement"]
    values["per_seed"] = [1.0, 1.0]
    (copy / "eval.json").write_text(json.dumps(result), "utf-8")
    assert judge.main([str(copy), option]) == 2
    assert "eval.json was changed after it was written" in one_line(capsys)


def test_a_damaged_teacher_of_another_run_is_not_copied(copy, tiny_run, capsys):
    other = shutil.copytree(tiny_run, copy.parent / "other")
    for run in (copy, other):
        shutil.rmtree(run / "teacher")
    shutil.copytree(other / "second_teacher", other / "teacher")
    assert train_tiny(copy.parent) == 0
    printed = capsys.readouterr().out
    assert "teacher: not copied from another run" in printed
    assert tensor_hashes(copy) == tensor_hashes(tiny_run)


def test_an_environment_that_made_half_a_teacher_is_kept(lab):
    """A check must not expect equal bits of it."""
    lab.run.record_environment({"cpu": "first"})
    lab.run.record_environment({"cpu": "second"})
    assert "earlier_environments" not in lab.run.manifest  # it made nothing
    lab.run.log("teacher", step=1, loss=1.0)
    lab.run.record_environment({"cpu": "third"})
    assert lab.run.manifest["earlier_environments"] == [{"cpu": "second"}]
