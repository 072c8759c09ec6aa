"""Texts of one's own: documents, prompts with their completions, or chats, in files or hub data
sets."""

import csv
import json
import multiprocessing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from configs.files import MAX_LINE, read_text, say
from configs.schema import LabError

TEXT_FILES = (".txt", ".md")
RECORD_FILES = (".jsonl", ".parquet", ".csv")
MOST_MALFORMED = 0.01  # of the records; with more, a file is something else than it should be
GRAM = 13  # words
ROLES = ("system", "user", "assistant", "tool")

Record = tuple[str, Any]  # where it is, and what it holds


@dataclass(frozen=True)
class Exchange:
    """A conversation up to an answer: turns of a role and a text, the last of the user; answer:
    None where a teacher is to write it."""

    turns: tuple[tuple[str, str], ...]
    answer: str | None


def files_in(path: Path, endings: tuple[str, ...]) -> list[Path]:
    """A file, or those of a folder with one of these endings. LabError if there is none."""
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.suffix in endings]
        if not files:
            raise LabError(
                f"task.path {path} holds no text; expected files that end in {', '.join(endings)}"
            )
        return files
    if not path.is_file():
        raise LabError(f"task.path: no file or folder {path}")
    if path.suffix not in endings:
        raise LabError(
            f"task.path {path}: found a file that ends in {path.suffix or 'nothing'!r}, expected "
            f"one of {', '.join(endings)}"
        )
    return [path]


def read_records(file: Path) -> Iterator[Record]:
    """The records of a file, one after the other; an exception in place of a record that cannot be
    read."""
    readers = {".jsonl": read_lines, ".csv": read_csv, ".parquet": read_parquet}
    yield from readers[file.suffix](file)


def read_lines(file: Path) -> Iterator[Record]:
    """JSON lines end at `\\n` alone; an empty one is none."""
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{file}, line {number}"
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            if len(line) > MAX_LINE:
                problem = f"found {len(line):,} bytes, expected at most {MAX_LINE:,}"
                yield where, ValueError(problem)
                continue
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                yield where, ValueError(f"found no JSON ({error})")


def read_csv(file: Path) -> Iterator[Record]:
    """With a header."""
    csv.field_size_limit(MAX_LINE)
    with open(file, encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        while True:
            try:
                record = next(reader)
            except StopIteration:
                return
            except (csv.Error, UnicodeDecodeError) as error:
                yield f"{file}, line {reader.line_num}", error
                return
            yield f"{file}, line {reader.line_num}", record


def read_parquet(file: Path) -> Iterator[Record]:
    number = 0
    try:
        for batch in pq.ParquetFile(file).iter_batches():
            for record in batch.to_pylist():
                number += 1
                yield f"{file}, row {number}", record
    except (OSError, ValueError) as error:
        raise LabError(f"{file} is not a Parquet file ({str(error).splitlines()[0]})") from None


def read_hub(name: str, split: str, streaming: bool = True) -> Iterator[Record]:
    """A data set of the hub, `name` or `name/config`; nothing of its code is run."""
    import datasets

    owner, _, rest = name.partition("/")
    repository, _, config = rest.partition("/")
    try:
        found = datasets.load_dataset(
            f"{owner}/{repository}", config or None, split=split, streaming=streaming
        )
        yield from ((f"{name}, row {number}", row) for number, row in enumerate(found, start=1))
    except Exception as error:
        raise LabError(
            f"task.dataset {name!r} cannot be loaded ({type(error).__name__}: "
            f"{(str(error).splitlines() or [''])[0][:200]})"
        ) from None


def well_formed(records: Iterable[Record], read: Any) -> Iterator[Any]:
    """read(record) of every record; those that cannot be read are counted and the first is named.
    LabError if they are more than 1 %."""
    total, malformed, first = 0, 0, ""
    for where, record in records:
        total += 1
        try:
            if isinstance(record, Exception):
                raise record
            yield read(record)
        except ValueError as error:
            malformed += 1
            first = first or f"{where}: {' '.join(str(error).split())}"
    if malformed > MOST_MALFORMED * total:
        raise LabError(
            f"{malformed} of {total} records are malformed, more than {MOST_MALFORMED:.0%}; the "
            f"first is {first}"
        )
    if malformed and multiprocessing.parent_process() is None:
        say(f"note: {malformed} of {total:,} records are malformed and left out, first {first}")


def text_of(record: Any, columns: dict[str, str]) -> str:
    """The document in a record. ValueError if it has none."""
    return string_in(record, columns.get("text", "text"))


def exchanges_of(record: Any, columns: dict[str, str]) -> list[Exchange]:
    """The exchanges of a record, one for every answer: of a prompt with its completion, if it has
    one, or of chat messages. ValueError if it has neither."""
    prompt, completion, messages = (
        columns.get(name, name) for name in ("prompt", "completion", "messages")
    )
    if isinstance(record, dict) and messages in record:
        return exchanges_of_chat(record[messages], messages)
    answer = string_in(record, completion) if has(record, completion) else None
    return [Exchange((("user", string_in(record, prompt)),), answer)]


def exchanges_of_chat(messages: Any, name: str) -> list[Exchange]:
    """An exchange for every turn of the assistant, with all turns before it; if the last turn is
    the user's, its answer is to be written."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"expected a list of messages in {name!r}")
    turns: list[tuple[str, str]] = []
    found = []
    for message in messages:
        role, content = (
            message.get(key) if isinstance(message, dict) else None for key in ("role", "content")
        )
        if role not in ROLES or not isinstance(content, str):
            raise ValueError(
                f"expected messages with a role ({', '.join(ROLES)}) and a text as content"
            )
        if role == "assistant" and turns:
            found.append(Exchange(tuple(turns), encodable(content)))
        turns.append((role, encodable(content)))
    if turns[-1][0] == "user":
        found.append(Exchange(tuple(turns), None))
    if not found:
        raise ValueError("no message has an answer of the assistant")
    return found


def has(record: Any, column: str) -> bool:
    return isinstance(record, dict) and record.get(column) is not None


def string_in(record: Any, column: str) -> str:
    if not isinstance(record, dict):
        raise ValueError(f"found {type(record).__name__}, expected an object")
    text = record.get(column)
    if not isinstance(text, str):
        there = ", ".join(map(str, record)) if text is None else type(text).__name__
        raise ValueError(f"expected a string {column!r}, found {there[:100]}")
    return encodable(text)


def encodable(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("the text holds half of a surrogate pair") from None
    return text


def overlap(train: Iterable[str], heldout: Iterable[str]) -> float:
    """The share of the different 13-grams of held-out words that also occur in training, whatever
    their case, as in Brown et al. 2020 (GPT-3), arXiv 2005.14165, appendix C."""
    found = {gram for text in heldout for gram in grams_of(text)}
    seen = {gram for text in train for gram in grams_of(text) if gram in found}
    return len(seen) / max(1, len(found))


def grams_of(text: str) -> Iterator[tuple[str, ...]]:
    words = text.lower().split()
    return zip(*(words[start:] for start in range(GRAM)), strict=False)


def read_plain(file: Path) -> str:
    return read_text(file).removeprefix("\ufeff").replace("\r\n", "\n")
