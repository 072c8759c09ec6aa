"""Every file of a run is bound to the run: what was exchanged, edited or damaged is never used."""

import json
import shutil

import pytest

import eval as judge
import train
from configs.schema import LabError
from tests.helpers import fit, tensor_hashes, train_tiny


def one_line(capsys) -> str:
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    return error


def forget(run, *stages) -> None:
    """As if these stages had not been reached."""
    manifest = json.loads((run / "manifest.json").read_text("utf-8"))
    for stage in stages:
        del manifest["stages"][stage]
        shutil.rmtree(run / stage)
    (run / "manifest.json").write_text(json.dumps(manifest | {"finished": None}), "utf-8")


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
    manifest = json.loads((copy / "manifest.json").read_text("utf-8"))
    del manifest["stages"][stage]
    (copy / "manifest.json").write_text(json.dumps(manifest | {"finished": None}), "utf-8")
    shutil.copy(other, copy / stage / name)
    assert train_tiny(copy.parent) == 0
    assert "set aside, and made again" in capsys.readouterr().out
    assert {file.name: file.read_bytes() for file in (copy / stage).glob("shard-*")} == before
