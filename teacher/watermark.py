"""A watermark in the tokens that a model draws: green lists (Kirchenbauer et al. 2023, arXiv
2301.10226, algorithm 2), as transformers draws them with the scheme "lefthash".

The token before decides which tokens are green: a share of the vocabulary, another for every key.
Their logits are raised by `bias`, so that a text has more of them than chance would give.
"""

import hashlib
import hmac
import os
import secrets
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.generation.logits_process import WatermarkLogitsProcessor
from transformers.modeling_outputs import CausalLMOutput

from configs.files import Shape, formatted_json, read_json
from configs.schema import LabError
from models.language import Forward, device_of

SHARE = 0.25  # of the vocabulary is green
MOST = 4096  # tokens of a vocabulary whose lists are kept in a table


class KeyFile(Shape):
    """A key that stays secret, and a salt that does, too: the published hash of both does not give
    the key away, and what is derived from both cannot be guessed, as 30 bits could be."""

    key: int
    salt: str

    def derived(self, *parts: object) -> bytes:
        """32 bytes that nobody can predict without both."""
        message = " ".join(map(str, parts)).encode()
        return hmac.new(f"{self.salt} {self.key}".encode(), message, hashlib.sha256).digest()


@dataclass(frozen=True)
class Watermark:
    """key: an odd number of 31 bits: others have twins that draw the same lists. bias: in nats."""

    key: int = field(repr=False)
    vocabulary: int
    bias: float

    @property
    def name(self) -> str:
        """Of the key, for a log; it does not give the key away."""
        return hashlib.sha256(f"watermark {self.key}".encode()).hexdigest()[:8]

    def raised(self, log_probs: Tensor, last: int | Tensor) -> Tensor:
        """Log-probabilities [.., V] of the next token, after the token `last` [..], with the
        mark."""
        raised = log_probs + self.bias * green(self.key, self.vocabulary)[last]
        return torch.log_softmax(raised, dim=-1)


def require_table(vocabulary: int) -> None:
    """LabError for a vocabulary that is too large."""
    if vocabulary > MOST:
        raise LabError(
            f"a watermark needs a table of {vocabulary:,} x {vocabulary:,} tokens; use a teacher "
            f"with at most {MOST:,}"
        )


@lru_cache(maxsize=32)  # of the keys in use; those that a text is compared with come once
def green(key: int, vocabulary: int) -> Tensor:
    """[V, V] whether a token is green after another. LabError for a vocabulary whose table would be
    too large. After token 0 nothing is: its list would be the same for every key."""
    require_table(vocabulary)
    lists = WatermarkLogitsProcessor(
        vocabulary, "cpu", greenlist_ratio=SHARE, hashing_key=key, seeding_scheme="lefthash"
    )
    table = torch.zeros((vocabulary, vocabulary), dtype=torch.bool)
    for last in range(1, vocabulary):
        table[last, lists._get_greenlist_ids(torch.tensor([last]))] = True
    return table


class Served:
    """A model as its API shows it: at a temperature, and with a watermark."""

    def __init__(self, model: Forward, watermark: Watermark | None, temperature: float) -> None:
        self.model, self.watermark, self.temperature = model, watermark, temperature

    @property
    def device(self) -> torch.device:
        return device_of(self.model)

    def __call__(self, input_ids: Tensor, **options: Any) -> CausalLMOutput:
        output = self.model(input_ids, **options)
        log_probs = torch.log_softmax(output.logits / self.temperature, dim=-1)
        if self.watermark:
            vocabulary, last = self.watermark.vocabulary, input_ids[:, -log_probs.shape[1] :]
            log_probs = self.watermark.raised(log_probs[..., :vocabulary], last)
        return CausalLMOutput(logits=log_probs)


# -- keys ------------------------------------------------------------------------------------------


def random_key() -> int:
    return secrets.randbits(30) * 2 + 1


def key_of_account(key: KeyFile, account: str) -> int:
    """A key of its own for every account, from that of the server."""
    return int.from_bytes(key.derived("key", account)[:4], "big") >> 1 | 1


def write_key(file: Path) -> str:
    """A new key. Returns its commitment: published before anybody is taught, it shows later that
    the key was not chosen to fit. LabError if the file exists."""
    if file.exists():
        raise LabError(f"{file} exists; a key that was used is needed to find its mark")
    content = KeyFile(key=random_key(), salt=secrets.token_hex(16))
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
        stream.write(formatted_json(content.model_dump()) + "\n")
    return commitment(content)


def read_key(file: Path) -> KeyFile:
    """LabError for a file that is missing or holds no key."""
    expected = "expected what python -m teacher.api key writes"
    if not file.is_file():
        raise LabError(f"no key file {file}; python -m teacher.api key FILE writes one")
    found = KeyFile(**read_json(file, KeyFile, expected))
    if not (found.key % 2 == 1 and 0 < found.key < 2**31):
        raise LabError(f"{file}: the key is no odd number of 31 bits; {expected}")
    return found


def commitment(content: KeyFile) -> str:
    return hashlib.sha256(f"{content.salt} {content.key}".encode()).hexdigest()
