"""A tokenizer with fewer tokens, for small students of teachers with large vocabularies, and the
teacher restricted to them.

A trimmed byte-level BPE tokenizer is one, too: it has some of the tokens, all parts that these are
merged from, and their merges. A token of the teacher that it lacks is written as several.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from configs.schema import LabError

SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


def trimmed(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], size: int
) -> PreTrainedTokenizerFast:
    """With at most `size` tokens: those that the texts use most fill half of it, those that were
    merged first, which are the most frequent in general, the rest. LabError for a tokenizer that is
    no byte-level BPE, or for a size that has no room for all bytes and special tokens."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model = content["model"]
    if model["type"] != "BPE" or "ByteLevel" not in repr(tokenizer.backend_tokenizer.decoder):
        raise LabError(
            "task.vocabulary: only byte-level BPE can be trimmed, and this tokenizer is "
            f"{model['type']}; remove it"
        )
    vocabulary: dict[str, int] = model["vocab"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    made_of: dict[str, tuple[str, str]] = {}
    for first, second in merges:
        made_of.setdefault(first + second, (first, second))
    added = {token["content"] for token in content["added_tokens"]}
    basic = {token for token in vocabulary if token not in made_of} | added
    if len(basic) > size:
        raise LabError(
            f"task.vocabulary: found {size}, expected at least {len(basic)}, the single bytes and "
            "special tokens"
        )
    kept = with_parts(basic, most_used(tokenizer, texts), made_of, (len(basic) + size) // 2)
    kept = with_parts(kept, made_of, made_of, size)
    number = {**vocabulary, **{t["content"]: t["id"] for t in content["added_tokens"]}}
    ids = {token: place for place, token in enumerate(sorted(kept, key=number.get))}
    model["vocab"] = {token: ids[token] for token in vocabulary if token in kept}
    model["merges"] = [
        [first, second] for first, second in merges if {first, second, first + second} <= kept
    ]
    for token in content["added_tokens"]:
        token["id"] = ids[token["content"]]
    renumber(content.get("post_processor"), ids)
    names = {name: getattr(tokenizer, name) for name in SPECIAL if getattr(tokenizer, name)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        chat_template=tokenizer.chat_template,
        clean_up_tokenization_spaces=False,
        split_special_tokens=getattr(tokenizer, "split_special_tokens", False),
        **names,
    )


def most_used(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Iterator[str]:
    """The tokens of some texts, the most frequent first."""
    counts: Counter[int] = Counter()
    for text in texts:
        counts.update(tokenizer(text, add_special_tokens=False)["input_ids"])
    order = sorted(counts, key=lambda token: (-counts[token], token))
    yield from tokenizer.convert_ids_to_tokens(order)


def with_parts(
    kept: set[str], tokens: Iterable[str], made_of: dict[str, tuple[str, str]], size: int
) -> set[str]:
    """A vocabulary with more tokens, and all that they are merged from, as long as there is
    room."""
    kept = set(kept)
    for token in tokens:
        more, waiting = set(), [token]
        while waiting:
            part = waiting.pop()
            if part not in kept and part not in more:
                more.add(part)
                waiting += made_of.get(part, ())
        if len(kept) + len(more) > size:
            break
        kept |= more
    return kept


def renumber(part: Any, ids: dict[str, int]) -> None:
    """The ids of special tokens in a post-processor, in place."""
    if isinstance(part, list):
        for one in part:
            renumber(one, ids)
    elif isinstance(part, dict):
        if isinstance(part.get("tokens"), list) and isinstance(part.get("ids"), list):
            part["ids"] = [ids[token] for token in part["tokens"]]
        for key, value in part.items():
            if key in ("sep", "cls") and isinstance(value, list):
                part[key] = [value[0], ids[value[0]]]
            else:
                renumber(value, ids)


def ids_in(theirs: PreTrainedTokenizerBase, ours: PreTrainedTokenizerBase) -> np.ndarray | None:
    """[V]: the id of each of our tokens in their vocabulary; None if one of them is missing."""
    there = theirs.get_vocab()
    tokens = ours.convert_ids_to_tokens(list(range(len(ours))))
    if not all(token in there for token in tokens):
        return None
    return np.array([there[token] for token in tokens])


class Restricted(nn.Module):
    """A language model over some of its tokens: it reads and writes our ids, and its probabilities
    are those that it gives to our tokens, renormalised."""

    def __init__(self, model: nn.Module, ids: np.ndarray) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("ids", torch.from_numpy(ids).to(model.device), persistent=False)

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def forward(self, input_ids: Tensor, past_key_values: Any = None, **options: Any) -> Any:
        if past_key_values is not None:
            options["past_key_values"] = past_key_values
        output = self.model(self.ids[input_ids], **options)
        output.logits = output.logits[..., self.ids]
        return output

    @torch.no_grad()
    def outside(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """[M]: the probability of all other tokens at some positions [B, L] of a text."""
        logits = self.model(self.ids[input_ids], use_cache=False).logits[positions].double()
        return 1 - logits.softmax(-1)[:, self.ids].sum(-1)
