"""Reading saved and pretrained models: what is damage, and what is not."""

from dataclasses import replace

import pytest

import models.language as language
from configs.schema import LabError, Model
from experiment.experiment import new_model, pretrained_of
from models.language import (
    build_model,
    initialise,
    load_model,
    save_model,
    sha256_of_model,
    sha256_of_tensors,
)
from tests.helpers import MODEL


@pytest.fixture
def folder(lab, tmp_path):
    model = initialise(build_model(Model(initializer_range=0.2, **MODEL), lab.task), 0)
    save_model(model, lab.task.tokenizer, tmp_path / "model", "a card")
    return tmp_path / "model"


@pytest.mark.parametrize("message", [None, "DefaultCPUAllocator: can't allocate memory"])
def test_too_little_memory_is_not_called_damage(message, folder, monkeypatch):
    """The advice must not be to remove a model that took hours."""
    error = MemoryError() if message is None else RuntimeError(message)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(language, "load_file", fail)
    monkeypatch.setattr(language.AutoModelForCausalLM, "from_pretrained", fail)
    for read in (load_model, sha256_of_model):
        with pytest.raises(LabError, match=r"for lack of memory .* it need not be damaged"):
            read(folder)


def test_another_error_is_not_called_too_little_memory(folder, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("bad header")

    monkeypatch.setattr(language.AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(LabError, match=r"cannot be read \(RuntimeError: bad header\); "):
        load_model(folder)


def test_a_folder_without_weights_is_rejected_by_their_name(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(LabError, match=r"holds no model\.safetensors"):
        load_model(folder)


@pytest.mark.parametrize("damage", ["missing", "unexpected"])
def test_a_model_without_all_of_its_weights_is_rejected_by_their_name(damage, folder):
    """As with prefixes that a compiled model leaves: part of it would be random."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "norm" in name)
    if damage == "missing":
        del tensors[name]
    else:
        tensors[f"_orig_mod.{name}"] = tensors[name].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(LabError, match=f"1 {damage} keys for its config, such as .*{name}"):
        load_model(folder)


def test_a_pretrained_model_that_changes_during_a_run_is_rejected(lab, folder):
    """Its hash is recorded when the run begins, and compared at every later start."""
    settings = Model(pretrained=str(folder))
    students = lab.config.students.model_copy(update={"model": settings})
    lab = replace(lab, config=lab.config.model_copy(update={"students": students}))
    lab.run.manifest["pretrained"] = pretrained_of(lab)
    expected = sha256_of_tensors(load_model(folder).state_dict())
    assert lab.run.manifest["pretrained"] == {str(folder): expected}
    new_model(lab, settings, 0)
    model = initialise(build_model(Model(initializer_range=0.1, **MODEL), lab.task), 1)
    save_model(model, lab.task.tokenizer, folder, "a card")
    with pytest.raises(LabError, match=r"has other weights than when .* was started"):
        new_model(lab, settings, 0)
