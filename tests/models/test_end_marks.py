"""End marks: of models that have several, and of models that are saved for others."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from configs.schema import Model
from models.generate import generate
from models.language import (
    build_model,
    end_marks,
    initialise,
    load_model,
    load_tokenizer,
    save_model,
    use_special_tokens,
)
from tasks.pronounce import Pronounce
from tests.helpers import MODEL


@pytest.fixture(scope="module")
def task():
    return Pronounce(limit=100)


@pytest.fixture
def folder(task, tmp_path):
    """A saved model whose generation config names other end marks."""
    model = initialise(build_model(Model(initializer_range=0.2, **MODEL), task), 0)
    save_model(model, task.tokenizer, tmp_path / "model", "a card")
    return tmp_path / "model"


def name_ends(folder, ends):
    file = folder / "generation_config.json"
    content = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps(content | {"eos_token_id": ends}), "utf-8")


def test_several_end_marks_count_as_one_with_the_probability_of_all(task, folder):
    ids = torch.tensor([task.prompt("lab")])
    with torch.no_grad():
        before = load_model(folder)(ids).logits.softmax(-1)
        name_ends(folder, [task.end, 7, 9])
        after = load_model(folder)(ids).logits.softmax(-1)
    torch.testing.assert_close(after[..., task.end], before[..., [task.end, 7, 9]].sum(-1))
    assert float(after[..., [7, 9]].max()) == 0
    others = [i for i in range(task.vocabulary) if i not in (task.end, 7, 9)]
    torch.testing.assert_close(after[..., others], before[..., others])


@pytest.mark.parametrize("ends", ["several", "another"])
def test_a_model_stops_at_its_own_end_marks(task, folder, ends):
    """At the token that it would have written there, the answer ends with the task's end mark."""
    prompt = torch.tensor(task.prompt("lab"))
    options = {"longest": 12, "end": task.end}
    (free,) = generate(load_model(folder), [prompt], **options)
    mark = int(free.tokens[3])
    first = free.tokens.tolist().index(mark)
    name_ends(folder, mark if ends == "another" else [task.end, mark])
    (stopped,) = generate(load_model(folder), [prompt], **options)
    assert stopped.tokens.tolist()[-1] == task.end
    assert len(stopped.tokens) <= first + 1


def test_a_trained_model_is_saved_with_the_end_mark_of_its_task_and_decodes_greedily(
    task, tmp_path
):
    """The start of a student may have had other marks, and a sampling temperature."""
    model = initialise(build_model(Model(initializer_range=0.2, **MODEL), task), 0)
    model.generation_config.update(eos_token_id=[3, 4], temperature=0.7, do_sample=True)
    use_special_tokens(model, task.tokenizer)
    save_model(model, task.tokenizer, tmp_path / "model", "a card")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert end_marks(saved) == [task.end]
    assert not saved.generation_config.do_sample
    assert saved.config.eos_token_id == task.end
    prompt = torch.tensor([task.prompt("lab")])
    (ours,) = generate(saved.eval(), list(prompt), longest=12, end=task.end)
    theirs = saved.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12)
    assert theirs[0, prompt.shape[1] :].tolist() == ours.tokens.tolist()


@pytest.mark.parametrize("architecture", ["qwen2", "mistral", "gpt2"])
def test_the_tokenizer_of_a_saved_model_is_the_same_tokenizer(task, tmp_path, architecture):
    model = build_model(Model(architecture=architecture, **MODEL), task)
    save_model(model, task.tokenizer, tmp_path / "model", "a card")
    saved = load_tokenizer(tmp_path / "model")
    assert saved.get_vocab() == task.tokenizer.get_vocab()
    assert saved("d i s t")["input_ids"] == task.tokenizer("d i s t")["input_ids"]
