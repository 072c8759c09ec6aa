"""Models: starting weights, saved folders, and the ones that are rejected."""

import hashlib
import json
from types import SimpleNamespace

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import eval as judge
from configs.schema import LabError, Model
from experiment.plan import Plan
from experiment.reading import read_config
from models.language import (
    Averaged,
    build_model,
    initialise,
    linear_head,
    load_model,
    parameter_count,
    require_memory,
    take_layers,
)
from models.pretrained import pretrained_layers
from tasks.pronounce import Pronounce
from tests.helpers import TINY, tensor_hashes


def test_transformers_loads_every_saved_model(tiny_run):
    folder = tiny_run / "students" / "distilled" / "seed-0"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = tokenizer("<s> lab =", return_tensors="pt")
    assert model(**asked).logits.shape[-1] == len(tokenizer) == 72
    card = (folder / "README.md").read_text()
    teacher = tensor_hashes(tiny_run)["teacher"]
    assert "Student `distilled`" in card
    assert teacher[:16] in card
    assert "data `pronounce`" in card
    assert "Trained on the CMU Pronouncing Dictionary (BSD, two clauses)." in card


def test_the_code_in_a_model_card_answers_as_ask_does(tiny_run, monkeypatch, capsys):
    folder = tiny_run / "students" / "distilled" / "seed-0"
    card = (folder / "README.md").read_text(encoding="utf-8")
    code = card.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(folder)
    exec(code, {})
    answer = capsys.readouterr().out.strip()
    assert judge.main([str(tiny_run), "--ask", "deepseek"]) == 0
    (line,) = [ln for ln in capsys.readouterr().out.splitlines() if ln.startswith("| distilled")]
    assert line.split("|")[2].strip() == answer != ""


def test_students_of_one_seed_start_from_the_same_weights():
    from experiment.reading import read_config
    from models.language import build_model, initialise

    config, task = read_config(TINY), Pronounce(limit=600)
    assert {"baseline", "distilled"} <= set(Plan(config).recipes)
    models = [initialise(build_model(config.students.model, task), seed) for seed in (0, 0, 1)]
    weights = [m.model.layers[0].mlp.up_proj.weight for m in models]
    assert weights[0].equal(weights[1])
    assert not weights[0].equal(weights[2])


@pytest.mark.parametrize("damage", ["cut", "flip", "missing"])
def test_a_damaged_model_is_rejected_by_name(damage, copy, capsys):
    file = copy / "students" / "baseline" / "seed-1" / "model.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    else:
        content[-100] ^= 1
        file.write_bytes(content[:-60] if damage == "cut" else content)
    assert judge.main([str(copy)]) == 2
    error = capsys.readouterr().err
    assert "baseline/seed-1" in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize("what", ["folder", "file"])
def test_a_model_that_links_out_of_the_run_is_rejected(what, copy, tmp_path, capsys):
    folder = copy / "students" / "baseline" / "seed-0"
    linked = folder if what == "folder" else folder / "model.safetensors"
    linked.rename(tmp_path / "elsewhere")
    linked.symlink_to(tmp_path / "elsewhere")
    assert judge.main([str(copy)]) == 2
    assert "is a symlink out of this run" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["pickle", "remote code"])
def test_a_model_that_carries_code_is_rejected(kind, copy, capsys):
    folder = copy / "students" / "baseline" / "seed-0"
    if kind == "pickle":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    else:
        config = json.loads((folder / "config.json").read_text())
        config |= {"model_type": "evil", "auto_map": {"AutoModelForCausalLM": "evil.Evil"}}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "evil.py").write_text("raise SystemExit('it ran')")
    assert judge.main([str(copy)]) == 2
    error = capsys.readouterr().err.strip()
    assert "baseline/seed-0" in error
    assert len(error.splitlines()) == 1


def test_a_model_is_identified_by_its_tensors_not_by_its_file(tiny_run):
    """Two files of one model may differ in bytes; their tensors' hash is the same."""
    from safetensors.torch import load_file, save_file

    from models.language import sha256_of_tensors

    file = tiny_run / "teacher" / "model.safetensors"
    tensors = load_file(file)
    copy = tiny_run / "copy.safetensors"
    save_file(tensors, copy, metadata={"other": "metadata"})
    assert hashlib.sha256(copy.read_bytes()).digest() != hashlib.sha256(file.read_bytes()).digest()
    assert sha256_of_tensors(load_file(copy)) == tensor_hashes(tiny_run)["teacher"]
    copy.unlink()


def test_several_teachers_are_the_mean_of_their_probabilities(tiny_run):
    models = [load_model(tiny_run / name) for name in ("teacher", "second_teacher")]
    ids = torch.tensor([Pronounce(limit=600).prompt("lab")])
    with torch.no_grad():
        each = [model(ids).logits.softmax(-1) for model in models]
        found = Averaged(models, 72)(ids).logits
    torch.testing.assert_close(found.exp(), sum(each) / 2)


def test_a_student_may_start_from_layers_of_its_teacher():
    task = Pronounce(limit=100)
    shape = read_config(TINY).teacher.model.model_copy(update={"num_hidden_layers": 3})
    teacher = initialise(build_model(shape, task), 0)
    student = initialise(build_model(shape.model_copy(update={"num_hidden_layers": 2}), task), 1)
    take_layers(student, teacher, [1, 3])
    ours, theirs = student.state_dict(), teacher.state_dict()
    for name, tensor in ours.items():
        source = name.replace("layers.1.", "layers.2.")
        assert torch.equal(tensor, theirs[source]), name
    student.model.layers = torch.nn.ModuleDict({"a": student.model.layers[0]})
    with pytest.raises(LabError, match="the layers of llama cannot be recognised by name"):
        take_layers(student, teacher, [1, 3])


def test_a_model_is_refused_only_by_a_machine_that_cannot_hold_it(monkeypatch):
    """The estimate from its sizes is just below the parameters of the leanest architecture, which
    shares keys and values among heads and has no gate."""
    task = Pronounce(limit=100)
    shape = Model(
        architecture="gpt_bigcode", hidden_size=256, intermediate_size=1024, num_hidden_layers=4,
        num_attention_heads=64,
    )  # fmt: skip
    needed = 16 * parameter_count(build_model(shape, task))
    machine = SimpleNamespace(total=needed)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    build_model(shape, task)
    machine.total = 0.95 * needed
    with pytest.raises(LabError, match="billion parameters need"):
        build_model(shape, task)


def test_the_embeddings_of_a_large_vocabulary_need_memory_too(monkeypatch):
    config = SimpleNamespace(
        vocab_size=50_000, hidden_size=64, num_hidden_layers=2, intermediate_size=256
    )
    needed = 16 * (50_000 * 64 + 2 * 64 * (2 * 64 + 2 * 256))
    machine = SimpleNamespace(total=needed)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    require_memory(config)
    machine.total = needed - 1
    with pytest.raises(LabError, match="billion parameters need"):
        require_memory(config)


def test_only_the_config_of_a_pretrained_model_is_read_for_its_layers(tiny_run, tmp_path):
    config = (tiny_run / "teacher" / "config.json").read_text("utf-8")
    (tmp_path / "config.json").write_text(config, "utf-8")
    assert pretrained_layers(Model(pretrained=str(tmp_path))) == 1
    with pytest.raises(LabError, match=r"model\.pretrained .*nowhere' cannot be loaded"):
        pretrained_layers(Model(pretrained=str(tmp_path / "nowhere")))


def test_logits_that_are_not_linear_in_the_last_states_have_no_linear_head():
    task = Pronounce(limit=100)
    model = build_model(read_config(TINY).teacher.model, task)
    assert linear_head(model).weight is model.lm_head.weight
    model.config.final_logit_softcapping = 30.0
    assert linear_head(model) is None
    assert linear_head(torch.nn.Linear(2, 2)) is None
