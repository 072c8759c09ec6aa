"""What OpenAI's API calls the tokens of a vocabulary."""

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from models.vocabulary import bytes_of, token_names
from tasks.text import train_tokenizer


def test_names_of_byte_level_bpe_are_texts_or_parts_of_letters():
    tokenizer = train_tokenizer(["café au lait, café noir"] * 20, 290)
    names = token_names(tokenizer)
    assert len(set(names)) == len(names) == len(tokenizer)
    ids = tokenizer("café au", add_special_tokens=False)["input_ids"]
    assert b"".join(bytes_of(names[i]) for i in ids).decode() == "café au"
    known = tokenizer.get_vocab()
    assert names[known["\u00c3"]] == "bytes:\\xc3"
    assert names[tokenizer.eos_token_id] == "</s>"


def test_names_of_sentencepiece_tell_bytes_from_letters():
    vocabulary = {"<unk>": 0, "<0x41>": 1, "<0xC3>": 2, "A": 3, "\u2581the": 4, "<0xz>": 5}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")),
        unk_token="<unk>",
    )
    tokenizer.backend_tokenizer.decoder = decoders.Metaspace()
    names = token_names(tokenizer)
    assert names == ["<unk>", "bytes:\\x41", "bytes:\\xc3", "A", " the", "<0xz>"]
    assert bytes_of(names[1]) == bytes_of(names[3]) == b"A"


@pytest.mark.parametrize("text", ["", "a", "é", "bytes", "bytes:"])
def test_an_ordinary_name_is_its_own_text(text):
    assert bytes_of(text) == text.encode()
