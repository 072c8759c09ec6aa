"""A tokenizer with fewer tokens, for small students of teachers with large vocabularies, and a
teacher as seen through them.

A trimmed byte-level BPE tokenizer is one, too: it has some of the tokens, all parts that these are
merged from, and their merges. A token of the teacher that it lacks is written as several.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from configs.files import read_text
from configs.schema import LabError

SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


def trimmed(
    tokenizer: PreTrainedTokenizerBase, wanted: Iterable[str], size: int | None = None
) -> PreTrainedTokenizerFast:
    """With the wanted tokens, the most important first, and all their parts; with a size they fill
    half of it at most, and those that were merged first, which are the most frequent in general,
    the rest. LabError for a tokenizer that is no byte-level BPE, or for a size that has no room for
    all bytes and special tokens."""
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
    if size is not None and len(basic) > size:
        raise LabError(
            f"task.vocabulary: found {size}, expected at least {len(basic)}, the single bytes and "
            "special tokens"
        )
    if size is None:
        kept = with_parts(basic, (t for t in wanted if t in vocabulary), made_of, len(vocabulary))
    else:
        kept = with_parts(basic, wanted, made_of, (len(basic) + size) // 2)
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


def listed_tokens(file: Path) -> list[str]:
    """The tokens in a file, one a line, as byte-level BPE writes them. LabError without any."""
    if not file.is_file():
        raise LabError(
            f"task.vocabulary: no file {file}; python -m experiment.vocabulary makes one"
        )
    tokens = [line for line in read_text(file).split("\n") if line]
    if not tokens:
        raise LabError(f"task.vocabulary: {file} lists no tokens; make it again")
    return tokens


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
    """[V]: the id of each of our tokens in their vocabulary; None if one of them is missing, or if
    ours is no smaller and yet another one: that is a mistake, not a choice of tokens."""
    there = theirs.get_vocab()
    tokens = ours.convert_ids_to_tokens(list(range(len(ours))))
    if not all(token in there for token in tokens):
        return None
    ids = np.array([there[token] for token in tokens])
    is_other = len(ours) >= len(theirs) and not np.array_equal(ids, np.arange(len(ids)))
    return None if is_other else ids


class Restricted(nn.Module):
    """A language model over some of its tokens: it reads our ids, and its probabilities are those
    that it gives to our tokens, renormalised. ids [V]: see `ids_in`. While it is `whole`, it reads
    and gives its own: a model that must do without words that it wants writes no good text."""

    def __init__(
        self,
        model: nn.Module,
        ids: np.ndarray,
        theirs: PreTrainedTokenizerBase,
        ours: PreTrainedTokenizerBase,
    ) -> None:
        super().__init__()
        self.model, self.theirs, self.ours = model, theirs, ours
        self.is_whole = False
        self.register_buffer("ids", torch.from_numpy(ids).to(model.device), persistent=False)
        self.our_id = {int(there): here for here, there in enumerate(ids)}

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
        if self.is_whole:
            return self.model(input_ids, **options)
        output = self.model(self.ids[input_ids], **options)
        output.logits = output.logits[..., self.ids]
        return output

    @contextmanager
    def whole(self) -> Iterator[None]:
        self.is_whole = True
        try:
            yield
        finally:
            self.is_whole = False

    def prompt(self, tokens: np.ndarray) -> list[int]:
        """A prompt of ours as the model itself would write it."""
        text = self.ours.decode(tokens.tolist(), skip_special_tokens=False)
        return self.theirs(text, add_special_tokens=False)["input_ids"]

    def translated(
        self, tokens: Tensor, log_probs: Tensor | None
    ) -> tuple[np.ndarray, Tensor | None]:
        """What the whole model wrote, n of its tokens and their log-probabilities [n, all], as m of
        ours and [m, V]. A token that we lack is written as several, of which only the text is
        known: log-probability 0 for itself."""
        pieces = [self.pieces(token) for token in tokens.tolist()]
        ours = np.array([piece for found in pieces for piece in found], np.int64)
        if log_probs is None:
            return ours, None
        known = np.array([len(found) == 1 for found in pieces for _ in found])
        source = np.repeat(np.arange(len(pieces)), [len(found) for found in pieces])
        rows = log_probs[torch.from_numpy(source)][:, self.ids].log_softmax(-1)
        for place in np.flatnonzero(~known):
            rows[place] = -torch.inf
            rows[place, ours[place]] = 0.0
        return ours, rows

    def pieces(self, token: int) -> list[int]:
        """One of their tokens in our ids."""
        if token in self.our_id:
            return [self.our_id[token]]
        text = self.theirs.convert_ids_to_tokens(token)
        return [piece.id for piece in self.ours.backend_tokenizer.model.tokenize(text)]

    @torch.no_grad()
    def outside(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """[M]: the probability of all other tokens at some positions [B, L] of a text."""
        output = self.model(self.ids[input_ids], use_cache=False)
        logits = output.logits[positions][:, : len(self.theirs)].double()
        return 1 - logits.softmax(-1)[:, self.ids].sum(-1)
