"""Generation: what is sampled, and at which temperature."""

import pytest
import torch

from configs.schema import Model
from models.generate import generate
from models.language import build_model, initialise
from tasks.pronounce import Pronounce
from tests.helpers import MODEL

TASK = Pronounce(limit=100)
START = [[TASK.tokenizer.bos_token_id]] * 64


@pytest.fixture(scope="module")
def model():
    """Undecided enough to write many different prompts, with a separator in most of them."""
    model = initialise(build_model(Model(initializer_range=0.2, **MODEL), TASK), 0).eval()
    model.lm_head = torch.nn.Linear(32, TASK.vocabulary)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        torch.nn.init.normal_(model.lm_head.weight, std=0.3, generator=generator)
        model.lm_head.bias.copy_(3.0 * (torch.arange(TASK.vocabulary) == TASK.separator))
    return model


def invented(model, **options):
    written = generate(
        model, START, longest=25, end=TASK.end, separator=TASK.separator,
        generator=torch.Generator().manual_seed(0), **options,
    )  # fmt: skip
    return [row.tokens.tolist() for row in written]


def test_an_invented_prompt_is_sampled_and_its_answer_greedy(model):
    answered = [row for row in invented(model) if TASK.separator in row[:-3]]
    assert len(answered) > 30
    prompts = [tuple(row[: row.index(TASK.separator)]) for row in answered]
    assert len(set(prompts)) > len(prompts) / 2
    for row in answered:
        ids = torch.tensor([START[0] + row])
        with torch.no_grad():
            likeliest = model(ids).logits[0, :-1].argmax(-1).tolist()
        begins = row.index(TASK.separator) + 1
        assert row[begins:] == likeliest[begins:]


def test_both_temperatures_may_be_set(model):
    greedy = invented(model, prompt_temperature=0.0)
    assert all(row == greedy[0] for row in greedy)
    sampled = invented(model, temperature=1.0)
    assert len(set(map(tuple, sampled))) > 50
