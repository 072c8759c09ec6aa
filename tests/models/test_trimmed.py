"""A smaller vocabulary of the same tokens, and a teacher restricted to it."""

import numpy as np
import pytest
import torch

from configs.schema import LabError, Model
from experiment.cost import CountedForward
from models.generate import generate
from models.language import build_language_model, initialise, load_tokenizer
from models.trimmed import Restricted, ids_in, most_used, trimmed
from tasks.text import train_tokenizer
from tests.serving import SHAPE

WORDS = "the sea rose and the old ships went out to fish or not, whatever the weather".split()


def texts(seed, count=300):
    draw = np.random.Generator(np.random.PCG64(seed))
    return [" ".join(draw.choice(WORDS, 9)) for _ in range(count)]


@pytest.fixture(scope="module")
def whole():
    draw = np.random.Generator(np.random.PCG64(9))
    syllables = "na ïve phi lo so pher ka mu ret zi bo lum qua der fin".split()
    strange = ["".join(draw.choice(syllables, 4)) for _ in range(150)]
    return train_tokenizer([*texts(0), *[" ".join(strange)] * 3], 600)


@pytest.fixture(scope="module")
def small(whole):
    return trimmed(whole, most_used(whole, texts(1)), 420)


def test_texts_of_kept_tokens_are_written_with_the_same_tokens(whole, small):
    assert len(small) <= 420 < len(whole) == 600
    used = {t for text in texts(1) for t in whole.tokenize(text)}
    assert used <= small.get_vocab().keys()
    for text in texts(2):
        assert small.tokenize(text) == whole.tokenize(text)


def test_any_text_can_be_written_and_read_back(whole, small):
    text = "naïvephilo sophermu quaderfinka? 日本 <s> 1234!"
    options = {"add_special_tokens": False, "split_special_tokens": True}
    for tokenizer in (whole, small):
        ids = tokenizer(text, **options)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert tokenizer.bos_token_id not in ids
    assert len(small(text, **options)["input_ids"]) > len(whole(text, **options)["input_ids"])


def test_special_tokens_and_the_chat_template_are_kept(whole, small, tmp_path):
    for name in ("bos_token", "eos_token", "pad_token"):
        assert getattr(small, name) == getattr(whole, name)
    assert small.bos_token_id == 1
    small.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.get_vocab() == small.get_vocab()
    assert again(texts(3)[0])["input_ids"] == small(texts(3)[0])["input_ids"]


def test_a_size_without_room_for_the_bytes_is_rejected(whole):
    with pytest.raises(LabError, match=r"task\.vocabulary: found 100, expected at least 259"):
        trimmed(whole, [], 100)
    assert len(trimmed(whole, [], 10_000)) == len(whole)


def test_a_restricted_teacher_gives_its_own_probabilities_renormalised(whole, small):
    model = build_language_model(Model(initializer_range=0.3, **SHAPE), whole, 32)
    model = initialise(model, 0).eval()
    ids = ids_in(whole, small)
    restricted = Restricted(model, ids, whole, small).eval()
    text = texts(4)[0]
    ours = torch.tensor([small(text)["input_ids"]])
    theirs = torch.tensor([whole(text)["input_ids"]])
    with torch.no_grad():
        found = restricted(ours).logits.softmax(-1)
        expected = model(theirs).logits.softmax(-1)[..., ids]
    outside = 1 - expected.sum(-1)
    torch.testing.assert_close(found, expected / expected.sum(-1, keepdim=True))
    assert 0.05 < float(outside.mean()) < 0.95
    everywhere = torch.ones_like(ours, dtype=torch.bool)
    torch.testing.assert_close(
        restricted.outside(ours, everywhere), outside[0].double(), atol=1e-5, rtol=1e-4
    )


def test_a_restricted_teacher_writes_in_the_smaller_vocabulary_and_is_charged(whole, small):
    model = build_language_model(Model(initializer_range=0.3, **SHAPE), whole, 32)
    model = initialise(model, 0).eval()
    forward = CountedForward(Restricted(model, ids_in(whole, small), whole, small).eval())
    prompts = [small(text)["input_ids"][:3] for text in texts(5, 4)]
    options = {"longest": 6, "end": -1, "keep_log_probs": True}
    written = generate(forward, [np.array(p) for p in prompts], **options)
    for answer, prompt in zip(written, prompts, strict=True):
        assert answer.log_probs.shape == (6, len(small))
        row = torch.tensor([[*prompt, *answer.tokens.tolist()]])
        with torch.no_grad():
            whole_pass = forward.model(row).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        torch.testing.assert_close(answer.log_probs, whole_pass, atol=1e-4, rtol=1e-4)
    assert forward.flops > 0


def test_a_tokenizer_with_a_strange_token_is_no_part_of_another(whole, small):
    assert ids_in(small, whole) is None
    assert np.array_equal(ids_in(whole, whole), np.arange(len(whole)))
    again = ids_in(whole, small)
    assert whole.convert_ids_to_tokens(again.tolist()) == small.convert_ids_to_tokens(
        list(range(len(small)))
    )
