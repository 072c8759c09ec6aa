"""The probe: what a model must do, on architectures that do and do not."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig

from configs.schema import LabError, Model
from models import probe as module
from models.generate import generate
from models.language import build_model, initialise, linear_head
from models.probe import probe
from tasks.digits import Digits
from tasks.pronounce import Pronounce

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def task():
    return Pronounce(limit=100)


def built(task, architecture, **settings):
    shape = Model(architecture=architecture, initializer_range=0.1, **SHAPE, **settings)
    return initialise(build_model(shape, task), 0)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mamba", "roberta", "granite", "opt"])
def test_an_architecture_passes_every_probe(task, architecture):
    probe(built(task, architecture), task, "teacher")


def test_a_classifier_passes_every_probe():
    task = Digits(limit=200)
    shape = Model(architecture="mlp", hidden_size=16, num_hidden_layers=1)
    probe(initialise(build_model(shape, task), 0), task, "teacher")


def test_a_model_that_reads_ahead_is_rejected_in_one_line(task):
    config = BertConfig(
        vocab_size=task.vocabulary, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        initializer_range=0.2,
    )  # fmt: skip
    with pytest.raises(LabError, match="teacher: bert is not causal") as error:
        probe(AutoModelForCausalLM.from_config(config), task, "teacher")
    assert "\n" not in str(error.value)


def broken(name, model):
    """A model with one fault."""
    forward = model.forward

    def faulty(input_ids, **options):
        if name == "cache":
            options |= {"past_key_values": None, "use_cache": False}
        output = forward(input_ids, **options)
        if name == "logits":
            output.logits = output.logits * float("nan")
        if name == "head":
            output.logits = output.logits.tanh()
        return output

    if name == "gradients":
        model.spare = torch.nn.Linear(2, 2)
    elif name == "positions":
        model.config.max_position_embeddings = 20
    else:
        model.forward = faulty
    return model


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("logits", "gives logits that are NaN or infinite"),
        ("cache", "generates other logits with a cache"),
        ("head", "does not compute its logits"),
        ("gradients", "never uses 2 of its parameters, such as spare"),
        ("positions", "has 20 positions, fewer than the 72 tokens of a row"),
    ],
)
def test_a_faulty_model_is_rejected_by_its_fault(task, name, message, monkeypatch):
    monkeypatch.setattr(module, "LARGE_VOCABULARY", 10)
    with pytest.raises(LabError, match=message):
        probe(broken(name, built(task, "llama")), task, "students")


def test_products_that_the_counter_does_not_know_are_found(task, monkeypatch):
    monkeypatch.setattr(module, "flop_registry", {})
    with pytest.raises(LabError, match="which the FLOP counter does not count"):
        probe(built(task, "llama"), task, "teacher")


def test_a_recurrent_model_remembers_its_prompt_while_it_generates(task):
    """Greedy generation equals the likeliest next token of a full forward pass, row by row."""
    model = built(task, "mamba").eval()
    prompts = [torch.tensor(task.prompt(word)) for word in ("lab", "teacher", "a")]
    for prompt, answer in zip(prompts, generate(model, prompts, longest=6, end=-1), strict=True):
        ids = prompt.tolist()
        for token in answer.tokens.tolist():
            with torch.no_grad():
                assert int(model(torch.tensor([ids])).logits[0, -1].argmax()) == token
            ids.append(token)


def test_the_head_of_a_scaled_model_gives_its_own_logits(task):
    model = built(task, "granite", settings={"logits_scaling": 8.0}).eval()
    ids = torch.tensor([task.prompt("lab")])
    with torch.no_grad():
        states = model.base_model(ids).last_hidden_state
        torch.testing.assert_close(linear_head(model).logits(states), model(ids).logits)


def test_a_probe_leaves_the_model_as_it_was(task):
    model = built(task, "gpt2").train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    probe(model, task, "teacher")
    assert model.training
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
