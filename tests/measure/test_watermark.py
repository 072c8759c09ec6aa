"""The test for a watermark: valid for any text, and strong where there is a mark."""

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from transformers import WatermarkDetector
from transformers.generation.logits_process import WatermarkLogitsProcessor

from configs.schema import LabError
from measure.watermark import Evidence, watermark_tests
from teacher.watermark import (
    SHARE,
    KeyFile,
    Watermark,
    commitment,
    green,
    key_of_account,
    random_key,
    read_key,
    write_key,
)

VOCABULARY = 64


SEVEN = KeyFile(key=7, salt="s")


def keys(count, seed=0):
    draw = np.random.Generator(np.random.PCG64(seed))
    return [int(key) * 2 + 1 for key in draw.integers(2**30, size=count)]


def chain(seed=0):
    """Log-probabilities [V, V] of a model that looks at one token; token 0 is never drawn."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(VOCABULARY, VOCABULARY, generator=generator)
    logits[:, 0] = -torch.inf
    return logits.log_softmax(-1)


def written(log_probs, count, seed, mark=None):
    """A text of a model with or without a mark: tokens [count]."""
    generator, found = torch.Generator().manual_seed(seed), [1]
    rows = torch.stack([mark.raised(row, last) if mark else row
                        for last, row in enumerate(log_probs)]).exp()  # fmt: skip
    for _ in range(count):
        found.append(int(torch.multinomial(rows[found[-1]], 1, generator=generator)))
    return torch.tensor(found)


def evidence_of(text, owner=None):
    found = Evidence(VOCABULARY)
    found.add(text[:-1], text[1:], None if owner is None else owner[text[:-1]].exp())
    return found


def test_the_mark_is_that_of_transformers():
    key, log_probs = keys(1)[0], torch.randn(3, VOCABULARY).log_softmax(-1)
    theirs = WatermarkLogitsProcessor(
        VOCABULARY, "cpu", greenlist_ratio=SHARE, bias=1.5, hashing_key=key
    )
    for last, row in zip((5, 9, 63), log_probs, strict=True):
        expected = theirs(torch.tensor([[1, last]]), row[None])[0].log_softmax(-1)
        torch.testing.assert_close(Watermark(key, VOCABULARY, 1.5).raised(row, last), expected)


def test_a_mark_of_no_bias_changes_nothing():
    row = torch.randn(VOCABULARY).log_softmax(-1)
    torch.testing.assert_close(Watermark(7, VOCABULARY, 0.0).raised(row, 5), row)


@pytest.mark.parametrize("repeats", [1, 40])
def test_with_keys_that_it_does_not_know_any_text_has_a_standard_normal_z(repeats):
    """A text that repeats itself, too, where a count of green tokens is far from normal."""
    text = written(chain(), 2000 // repeats, seed=1).repeat(repeats)
    found = evidence_of(text)
    zs = [found.z(key) for key in keys(300)]
    assert 0.85 < np.std(zs) < 1.15
    assert kstest(zs, "norm").pvalue > 0.001


def test_the_detector_of_the_library_is_not_valid_for_a_corpus():
    """Its z assumes that every token is drawn anew; over keys it spreads far wider."""
    text = written(chain(), 50, seed=1).repeat(40)[None]
    config = type("Config", (), {
        "vocab_size": VOCABULARY, "bos_token_id": 1, "is_encoder_decoder": False,
    })()  # fmt: skip
    zs = []
    for key in keys(40):
        settings = {"greenlist_ratio": SHARE, "bias": 1.0, "hashing_key": key,
                    "seeding_scheme": "lefthash", "context_width": 1}  # fmt: skip
        detector = WatermarkDetector(config, "cpu", settings)
        zs.append(float(detector(text, return_dict=True).z_score[0]))
    assert np.std(zs) > 3


def test_a_mark_is_found_and_by_the_owner_with_fewer_tokens():
    owner, key = chain(), keys(1, seed=5)[0]
    text = written(owner, 1000, seed=2, mark=Watermark(key, VOCABULARY, 1.0))
    texts = {"text alone": evidence_of(text), "with the owner": evidence_of(text, owner)}
    alone, known = watermark_tests(texts, key, keys(200)).values()
    assert alone.z > 4
    assert known.z > 1.5 * alone.z
    assert known.p_rank == 1 / 201
    assert known.p_normal < 1e-6
    assert known.tokens == 1000


def test_an_innocent_text_is_accused_as_often_as_the_level_says():
    """Text of a model that learned from the owner's unmarked text: near it, and not the same."""
    owner = chain()
    text = written(owner, 4000, seed=3)
    counts = torch.ones(VOCABULARY, VOCABULARY)
    counts[:, 0] = 0
    counts.index_put_((text[:-1], text[1:]), torch.ones(4000), accumulate=True)
    student = (counts / counts.sum(1, keepdim=True)).log()
    found = evidence_of(written(student, 4000, seed=4), owner)
    zs = np.array([found.z(key) for key in keys(400, seed=6)])
    assert 0.02 <= np.mean(zs > 1.645) <= 0.09
    assert 0.9 < zs.std() < 1.1


def test_after_token_0_nothing_is_green_or_counted():
    assert not green(7, VOCABULARY)[0].any()
    assert set(green(7, VOCABULARY)[1:].sum(1).tolist()) == {VOCABULARY // 4}
    found = Evidence(VOCABULARY)
    found.add(torch.zeros(5, dtype=torch.long), torch.arange(5))
    assert (found.tokens, found.z(7)) == (0, 0.0)


def test_a_vocabulary_that_is_too_large_is_named():
    with pytest.raises(LabError, match="a teacher with at most 4,096"):
        green(7, 50_000)


def test_a_key_file_keeps_its_key_and_its_commitment(tmp_path):
    file = tmp_path / "key.json"
    committed = write_key(file)
    assert file.stat().st_mode & 0o077 == 0
    assert commitment(read_key(file)) == committed
    with pytest.raises(LabError, match="exists"):
        write_key(file)
    file.write_text('{"key": "seven"}')
    with pytest.raises(LabError, match=r"expected what python -m teacher\.api key writes"):
        read_key(file)
    file.write_text('{"key": 0, "salt": "s"}')
    with pytest.raises(LabError, match="no odd number of 31 bits"):
        read_key(file)
    with pytest.raises(LabError, match="no key file"):
        read_key(tmp_path / "nothing.json")


def test_keys_are_odd_and_of_31_bits_and_those_of_accounts_differ():
    found = {random_key() for _ in range(50)} | {key_of_account(SEVEN, f"a{n}") for n in range(50)}
    assert len(found) == 100
    assert all(key % 2 == 1 and 0 < key < 2**31 for key in found)
    assert key_of_account(SEVEN, "a") == key_of_account(SEVEN, "a")
    for other in (KeyFile(key=9, salt="s"), KeyFile(key=7, salt="t")):
        assert key_of_account(SEVEN, "a") != key_of_account(other, "a")
