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


@pytest.mark.parametrize(
    "architecture", ["llama", "gpt2", "mamba", "roberta", "granite", "opt", "qwen2", "gptj"]
)
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
        if name == "excluded":
            output.logits[..., 5] = -torch.inf
        if name == "error":
            raise RuntimeError("shapes\ndo not fit")
        return output

    if name == "gradients":
        model.spare = torch.nn.Linear(2, 2)
    elif name == "sizes":
        model.spare = torch.nn.Linear(1000, 1000)
        model.spare.requires_grad_(False)
    elif name == "tokens":
        model.resize_token_embeddings(50)
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
        ("sizes", "has 1,0[0-9,]+ parameters, at most .* expected from its sizes"),
        ("tokens", "has embeddings for 50 tokens, but its tokenizer has ids up to 71"),
        ("excluded", "excludes tokens by logits of -inf, so it cannot learn them"),
        ("error", r"fails the probe 'logits' \(RuntimeError: shapes do not fit\)"),
    ],
)
def test_a_faulty_model_is_rejected_by_its_fault(task, name, message, monkeypatch):
    monkeypatch.setattr(module, "LARGE_VOCABULARY", 10)
    with pytest.raises(LabError, match=message):
        probe(broken(name, built(task, "llama")), task, "students")


def test_a_teacher_that_is_used_unchanged_may_exclude_tokens(task):
    probe(broken("excluded", built(task, "llama")), task, "teacher", learns=False)


def test_a_tokenizer_without_an_end_mark_is_rejected(task):
    endless = Pronounce(limit=100)
    endless.tokenizer.eos_token = None
    with pytest.raises(LabError, match="a tokenizer without an EOS token"):
        probe(built(task, "llama"), endless, "teacher")


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gptj", "gpt_bigcode"])
def test_the_sizes_asked_for_are_the_sizes_built(task, architecture):
    """Half the inner width removes half of the MLP, whatever the architecture calls it."""
    small, large = (built(task, architecture, intermediate_size=n) for n in (40, 80))
    widths = [{n for p in model.parameters() for n in p.shape} for model in (small, large)]
    assert {40, 80} & widths[0] == {40}
    assert {40, 80} & widths[1] == {80}
    assert max(max(w) for w in widths) <= 160


def test_a_size_that_an_architecture_does_not_have_is_rejected(task):
    with pytest.raises(LabError, match="bloom has no such size"):
        built(task, "bloom", intermediate_size=40)
    with pytest.raises(LabError, match="cannot be built with these sizes") as error:
        built(task, "gpt_neo")
    assert "\n" not in str(error.value)


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
