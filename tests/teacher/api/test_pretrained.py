"""A pretrained model behind the API: its own tokenizer, chat template and end marks."""

import pytest
import torch
from openai import BadRequestError, OpenAI

from configs.schema import LabError, Model
from models.language import build_language_model, initialise, save_model
from models.pretrained import load_pretrained
from models.vocabulary import bytes_of
from tasks.text import train_tokenizer
from teacher.api import __main__ as command
from tests.serving import SHAPE, serving

TEMPLATE = (
    "{% for message in messages %}{{ '<s>' + message['role'] + ': ' + message['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<s>assistant: ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose answers can also end with <s>, as those of chat models with two end marks."""
    tokenizer = train_tokenizer(
        ["system: user: assistant: the sea and the old ships, café"] * 9, 300
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.split_special_tokens = False
    settings = Model(initializer_range=0.2, **SHAPE)
    model = initialise(build_language_model(settings, tokenizer, 128), 0)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.bos_token_id]
    found = tmp_path_factory.mktemp("pretrained") / "chatty"
    save_model(model, tokenizer, found, "")
    return found


@pytest.fixture(scope="module")
def served(folder, tmp_path_factory):
    teacher = command.pretrained(str(folder))
    where = tmp_path_factory.mktemp("served")
    with serving(where, teacher.engine, teacher.prompts, teacher.name) as found:
        found.tokenizer = teacher.prompts.tokenizer
        key = found.store.add_account("A reader", "internal")[1]
        found.client = OpenAI(base_url=found.url, api_key=key, max_retries=0)
        yield found
        found.client.close()


MESSAGES = [
    {"role": "system", "content": "the sea"},
    {"role": "user", "content": "and the ships?"},
]


def test_a_chat_is_written_by_the_template(served, folder):
    answer = served.client.chat.completions.create(
        model="chatty", messages=MESSAGES, temperature=0, max_tokens=12, logprobs=True,
        top_logprobs=3,
    )  # fmt: skip
    text = "<s>system: the sea<s>user: and the ships?<s>assistant: "
    prompt = served.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert answer.usage.prompt_tokens == len(prompt)
    wrote, model = [], load_pretrained(Model(pretrained=str(folder))).eval()
    end, start = served.tokenizer.eos_token_id, served.tokenizer.bos_token_id
    with torch.no_grad():
        while len(wrote) < 12 and end not in wrote:
            log_probs = model(torch.tensor([prompt + wrote])).logits[0, -1].log_softmax(-1)
            log_probs[end] = torch.logaddexp(log_probs[end], log_probs[start])
            log_probs[start] = -torch.inf
            wrote.append(int(log_probs.argmax()))
            shown = answer.choices[0].logprobs.content[len(wrote) - 1]
            assert shown.logprob == pytest.approx(float(log_probs.max()), abs=1e-4)
    assert answer.choices[0].message.content == served.tokenizer.decode(
        wrote, skip_special_tokens=True
    )


def test_the_names_and_bytes_of_tokens_are_their_text(served):
    answer = served.client.completions.create(
        model="chatty", prompt="the café", max_tokens=0, echo=True, logprobs=1
    )
    names = answer.choices[0].logprobs.tokens
    assert b"".join(map(bytes_of, names)).decode() == "the café"
    chat = served.client.chat.completions.create(
        model="chatty", messages=MESSAGES, seed=1, max_tokens=40, logprobs=True
    )
    text = b"".join(bytes(one.bytes) for one in chat.choices[0].logprobs.content)
    shown = text.removesuffix(b"</s>").decode(errors="replace")
    assert chat.choices[0].message.content.startswith(shown[:20].rstrip("\ufffd"))


def test_a_text_has_a_start_mark_only_where_the_tokenizer_adds_one(served):
    prompts = served.service.prompts
    plain = served.tokenizer("the sea")["input_ids"]
    assert prompts.raw("the sea") == plain
    assert plain[0] != served.tokenizer.bos_token_id


def test_messages_that_the_template_does_not_know_are_refused(served, monkeypatch):
    monkeypatch.setattr(served.tokenizer, "chat_template", "{{ raise_exception('no system') }}")
    with pytest.raises(BadRequestError, match="no system"):
        served.client.chat.completions.create(model="chatty", messages=MESSAGES)
    monkeypatch.setattr(served.tokenizer, "chat_template", None)
    with pytest.raises(BadRequestError, match="has no chat template; continue a text"):
        served.client.chat.completions.create(model="chatty", messages=MESSAGES)


def test_a_model_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(LabError, match="expected a folder or a hub id"):
        command.pretrained(str(tmp_path / "nothing"))
    for arguments in (["serve"], ["serve", "runs/a", "--pretrained", "b"]):
        options = command.parser().parse_args(arguments)
        with pytest.raises(LabError, match="serve what"):
            options.do(options)
