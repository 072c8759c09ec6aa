"""The task `instruct`: to answer prompts, as a pretrained teacher or one's own data does.

Records of `path` or `dataset` hold a prompt with its completion, a prompt alone, or chat messages.
Every answer is one row: the conversation before it, in the chat template of the tokenizer, is the
prompt. If the answers are missing, the teacher writes them, also those of the evaluation splits; a
model that no teacher taught can then learn only from `documents`, text that no teacher wrote.
"""

import hashlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import Field

from configs.files import say
from configs.schema import LabError, Section
from models.rows import Rows, row_id
from tasks.examples import (
    RECORD_FILES,
    Exchange,
    exchanges_of,
    files_in,
    overlap,
    read_hub,
    read_records,
    well_formed,
)
from tasks.text import (
    SPLITS,
    FreeText,
    objections_to_vocabulary,
    read_documents,
    vocabulary_field,
)
from tasks.tokenizers import chat_prompt


class Instruct(FreeText):
    """Rows of prompts and answers, or of prompts alone."""

    class Settings(Section):
        path: str | None = None  # a folder, or a .jsonl, .parquet or .csv file
        dataset: str | None = None  # of the hub: owner/name, or owner/name/config
        # Where records have them, as in {prompt: question, completion: answer}.
        columns: dict[str, str] = {}
        documents: str | None = None  # where the prompts have no answers: text to learn from
        system: str | None = None  # what the system says first
        tokenizer: str | None = None  # of a pretrained model: a folder, a GGUF file or a hub id
        # At most so many of its tokens, or a file that lists those to keep
        vocabulary: int | str | None = vocabulary_field()
        row_tokens: int = Field(256, ge=4)
        answer_tokens: int = Field(128, ge=1)
        limit: int | None = Field(None, ge=20)  # prompts, a random subset

    name = "instruct"
    item_noun = "prompts"

    @classmethod
    def objections(cls, settings: Settings) -> Iterator[str]:
        yield from cls.objections_to_source(settings)
        yield from objections_to_vocabulary(settings)
        if not settings.tokenizer:
            yield "tokenizer: missing; give the folder, GGUF file or hub id of the teacher's"
        if settings.answer_tokens >= settings.row_tokens:
            yield (
                f"answer_tokens: {settings.answer_tokens} leaves none of {settings.row_tokens} "
                "row_tokens for the prompt; choose fewer"
            )

    @classmethod
    def objections_to_source(cls, settings: Settings) -> Iterator[str]:
        if bool(settings.path) == bool(settings.dataset):
            yield "path: set one of path and dataset, where the prompts are"

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.longest_row, self.longest_answer = (
            self.settings.row_tokens, self.settings.answer_tokens
        )  # fmt: skip
        exchanges = {self.id_of(exchange): exchange for exchange in self.read()}
        missing = sum(exchange.answer is None for exchange in exchanges.values())
        if missing not in (0, len(exchanges)):
            raise LabError(
                f"{missing} of {len(exchanges)} prompts have no answer; expected all or none of "
                "them: split them into two data sets"
            )
        self.unanswered = missing > 0
        if self.settings.documents and not self.unanswered:
            raise LabError(
                "task.documents: the prompts have answers, which models without a teacher learn "
                "from; remove it"
            )
        self.by_split: dict[str, dict[int, Exchange]] = {split: {} for split in SPLITS}
        for i in sorted(exchanges)[: self.settings.limit]:  # hashes: a random sample
            self.by_split[self.split_of(exchanges[i])][i] = exchanges[i]
        for split, members in self.by_split.items():
            if not members:
                raise LabError(
                    f"task {self.name}: none of {len(exchanges)} prompts is in split {split}; use "
                    "more (about 1 in 20 is held out)"
                )
        self.open_tokenizer(
            self.settings.tokenizer, self.settings.vocabulary, self.texts_of_training()
        )
        self.answered: dict[str, Rows] = {}

    # -- reading -------------------------------------------------------------------------------

    def read(self) -> Iterator[Exchange]:
        """The exchanges of the source."""
        settings = self.settings
        if settings.dataset:
            records = read_hub(settings.dataset, "train")
        else:
            files = files_in(Path(settings.path), RECORD_FILES)
            records = (record for file in files for record in read_records(file))
        for found in well_formed(records, lambda one: exchanges_of(one, settings.columns)):
            yield from found

    def id_of(self, exchange: Exchange) -> int:
        return row_id(f"instruct {exchange.turns} {exchange.answer}")

    def split_of(self, exchange: Exchange) -> str:
        """By a hash of the first turn of the user: a conversation is on one side, with all its
        answers, and so are the answers to one prompt."""
        first = next(text for role, text in exchange.turns if role == "user")
        digest = hashlib.sha256(f"split {first}".encode()).digest()
        bucket = int.from_bytes(digest[:8], "big") % 100
        return next(split for split, buckets in SPLITS.items() if bucket in buckets)

    def texts_of_training(self) -> list[str]:
        """All text that students may learn from before a teacher has written any."""
        exchanges = self.by_split["train"].values()
        texts = [text for one in exchanges for _, text in one.turns]
        return [*texts, *(e.answer for e in exchanges if e.answer), *self.documents]

    @cached_property
    def documents(self) -> list[str]:
        """Text that no teacher wrote."""
        return self.own_documents()

    def own_documents(self) -> list[str]:
        if not self.settings.documents:
            return []
        found = read_documents(Path(self.settings.documents), self.settings.columns)
        return [text for text in found if text.strip()]

    def overlap(self) -> float | None:
        """Of answers; where a teacher writes them, none are known before it has."""
        if self.unanswered:
            return None
        sides = (self.by_split[split].values() for split in ("train", "heldout"))
        return overlap(*([one.answer for one in side] for side in sides))

    # -- rows ----------------------------------------------------------------------------------

    @cached_property
    def asked(self) -> dict[str, Rows]:
        """{split: its prompts, with their answers if there are any}. What is too long for a row is
        left out, and counted."""
        return {split: self.rows_of(split, members) for split, members in self.by_split.items()}

    def rows_of(self, split: str, exchanges: dict[int, Exchange]) -> Rows:
        most = self.longest_row - self.longest_answer
        ids, prompts, answers = [], [], []
        for i, exchange in exchanges.items():
            prompt = self.prompt_of(exchange.turns)
            answer = [] if self.unanswered else [*self.encode_answer(exchange.answer), self.end]
            if len(prompt) <= most and len(answer) <= self.longest_answer:
                ids.append(i)
                prompts.append(prompt)
                answers.append(answer)
        if len(ids) < len(exchanges):
            say(
                f"note: {len(exchanges) - len(ids)} of {len(exchanges):,} {split} prompts are left "
                f"out: the prompt has more than {most} tokens, or the answer more than "
                f"{self.longest_answer}"
            )
        if not ids:
            raise LabError(
                f"task {self.name}: no {split} prompt fits a row; raise row_tokens and "
                "answer_tokens"
            )
        return Rows.build(ids, prompts, answers)

    def rows(self, split: str) -> Rows:
        """What is learned without a teacher, and what is asked in the other splits."""
        return self.read_rows if split == "train" and self.unanswered else self.asked[split]

    @cached_property
    def read_rows(self) -> Rows:
        """The documents, cut into rows; without any, the prompts, of which nothing is learned."""
        if not self.documents:
            return self.asked["train"]
        ids, prompts, completions = [], [], []
        size = self.longest_row - 1
        for text in dict.fromkeys(self.documents):
            tokens = [*self.encode_answer(text), self.end]
            for begin in range(0, len(tokens), size):
                ids.append(row_id(f"document {begin} {text}"))
                prompts.append([self.start])
                completions.append(tokens[begin : begin + size])
        return Rows.build(ids, prompts, completions)

    def prompts(self, split: str) -> Rows:
        return self.asked[split]

    def prompt_of(self, turns: tuple[tuple[str, str], ...]) -> list[int]:
        """A conversation in the chat template; without one, its texts line by line."""
        system = self.settings.system
        if system is not None and turns[0][0] != "system":
            turns = (("system", system), *turns)
        messages = [{"role": role, "content": text} for role, text in turns]
        tokens = chat_prompt(self.tokenizer, messages)
        if tokens is None:
            tokens = [self.start]
            for _, text in turns:
                tokens += self.encode_answer(f"{text}\n")
        return tokens

    def prompt(self, question: str) -> list[int]:
        tokens = self.prompt_of((("user", question),))
        if len(tokens) >= self.longest_row:
            raise LabError(
                f"{question[:40]!r}... has {len(tokens)} tokens, expected fewer than "
                f"{self.longest_row}; use a shorter text"
            )
        return tokens

    def question(self, rows: Rows, i: int) -> str:
        """The last turn of the user."""
        exchange = self.by_id.get(int(rows.ids[i]))
        return exchange.turns[-1][1] if exchange else self.render(rows.prompt(i)[1:])

    @cached_property
    def by_id(self) -> dict[int, Exchange]:
        return {i: one for members in self.by_split.values() for i, one in members.items()}

    @cached_property
    def answers(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for exchange in self.by_split["heldout"].values():
            if exchange.answer:
                found.setdefault(exchange.turns[-1][1], []).append(exchange.answer)
        return found

    def truths(self, question: str) -> list[str]:
        """The answers of the held-out data."""
        return self.answers.get(question, [])

    # -- answers of a teacher ------------------------------------------------------------------

    def adopt(self, split: str, rows: Rows) -> None:
        """What a teacher answered to the prompts of a split."""
        self.answered[split] = rows
        self.__dict__.pop("bytes_of_row", None)

    def evaluation_rows(self, split: str) -> Rows:
        return self.answered.get(split) or self.rows(split)

    @cached_property
    def bytes_of_row(self) -> dict[int, int]:
        every = (self.evaluation_rows(split) for split in SPLITS)
        return {i: n for rows in every for i, n in self.bytes_of(rows).items()}

    @property
    def examples(self) -> tuple[str, ...]:
        return tuple(exchange.turns[-1][1] for exchange in [*self.by_id.values()][:2])
