"""Reading and writing files: atomically, as JSON or YAML, and with one clear line on failure."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from configs.schema import LabError

MAX_CONFIG = 1_000_000  # characters
MAX_LINE = 10_000_000  # characters
ELSEWHERE = "restore it, or move it elsewhere and run the command that made it again"


class Shape(BaseModel):
    """What a file must hold before its content is used. Other keys are kept."""

    model_config = ConfigDict(extra="allow", strict=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a small file completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    """fsync a file that another library wrote: after a power cut it might otherwise be empty."""
    with open(path, "r+b") as file:  # Windows refuses fsync on a file opened for reading
        os.fsync(file.fileno())


def write_json(path: Path, content: Any) -> None:
    write_atomically(path, formatted_json(content) + "\n")


def formatted_json(content: Any, indent: str = "") -> str:
    """JSON with a line for every innermost object, such as a metric, so that it can be read and
    compared line by line."""
    parts = content.values() if isinstance(content, dict) else content
    if not isinstance(content, dict | list) or all(is_flat(part) for part in parts):
        return json.dumps(content, ensure_ascii=False)
    if isinstance(content, dict):
        lines = [
            f"{json.dumps(str(key), ensure_ascii=False)}: {formatted_json(value, indent + ' ')}"
            for key, value in content.items()
        ]
    else:
        lines = [formatted_json(value, indent + " ") for value in content]
    opening, closing = "{}" if isinstance(content, dict) else "[]"
    body = ",\n".join(f"{indent} {line}" for line in lines)
    return f"{opening}\n{body}\n{indent}{closing}"


def is_flat(value: Any) -> bool:
    """A scalar, or a list of scalars."""
    items = value if isinstance(value, list) else [value]
    return not any(isinstance(item, dict | list) for item in items)


def read_json(path: Path, shape: Any = None, advice: str = ELSEWHERE) -> Any:
    """LabError if the file is missing, damaged or of another shape."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LabError(f"no {path}; is this the folder of a run that train.py made?") from None
    except (ValueError, RecursionError) as error:
        raise LabError(f"{path} is damaged ({error}); {advice}") from None
    if shape is not None:
        require_shape(content, shape, str(path), advice)
    return content


def require_shape(content: Any, shape: Any, source: str, advice: str = ELSEWHERE) -> None:
    """LabError with the first key that differs, if content does not have this shape."""
    try:
        TypeAdapter(shape).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        message = " ".join(first["msg"].split())
        what = f"{key}: {message[0].lower()}{message[1:]}" if key else message
        raise LabError(f"{source} has another structure ({what}); {advice}") from None


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Write JSON with a hash of its content."""
    write_json(path, {**content, "seal": sha256_of_json(content)})


def read_sealed(path: Path, shape: Any = None, advice: str = ELSEWHERE) -> dict[str, Any]:
    """What `write_sealed` wrote. LabError if it was changed since, or is of another shape."""
    content = read_json(path, dict, advice)
    seal = content.pop("seal", None)
    if seal != sha256_of_json(content):
        raise LabError(f"{path} was changed after it was written (its seal differs); {advice}")
    if shape is not None:
        require_shape(content, shape, str(path), advice)
    return content


def sha256_of_json(content: Any) -> str:
    """The hash of what JSON says: of values, not of layout or the order of keys."""
    as_read = json.loads(json.dumps(content))
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()


def read_text(file: Path) -> str:
    """LabError if a file is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise LabError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start})") from None


class PlainLoader(yaml.SafeLoader):
    """Without duplicate keys, of which YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is given twice", key.start_mark
                )
            if isinstance(key.value, str):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_jsonl(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, object) for every line of JSONL: only `\\n` ends one, as JSON allows the other line
    breaks of Unicode inside a string. LabError for a line that is too long or not an object."""
    content = read_text(file).removeprefix("\ufeff")
    for number, line in enumerate(content.split("\n"), start=1):
        where = f"{file}, line {number}"
        if len(line) > MAX_LINE:
            raise LabError(f"{where}: {len(line):,} characters, expected at most {MAX_LINE:,}")
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise LabError(f"{where} is not JSON ({error})") from None
        if not isinstance(record, dict):
            raise LabError(f"{where}: found {type(record).__name__}, expected an object")
        yield where, record


def read_yaml(text: str, source: str) -> Any:
    """Plain YAML only: no tags that build objects, no aliases that expand without bound, no
    duplicate keys."""
    if len(text) > MAX_CONFIG:
        raise LabError(f"{source}: {len(text):,} characters, expected at most {MAX_CONFIG:,}")
    try:
        for event in yaml.parse(text, PlainLoader):
            if isinstance(event, yaml.AliasEvent):
                raise LabError(f"{source}: YAML aliases (*{event.anchor}) are not accepted")
        return yaml.load(text, PlainLoader)
    except (ValueError, RecursionError) as error:  # a 13th month, a thousand brackets
        what = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise LabError(f"{source}: not plain YAML: {what}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        if "'\\t'" in problem:
            problem = "a tab, which YAML does not accept; indent with spaces"
        raise LabError(f"{source}: not plain YAML{where}: {problem}") from None


def printable(text: object) -> str:
    """Text for a terminal: characters that control it, which a path or an answer may contain, are
    shown as escapes."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in str(text))


def say(text: str) -> None:
    print(printable(text))


def sha256_of_file(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def differences(old: Any, new: Any, key: str = "") -> list[str]:
    """`key: old there, new here` for every leaf in which two nested dicts differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for name in dict.fromkeys([*old, *new])
            for line in differences(old.get(name), new.get(name), f"{key}.{name}".strip("."))
        ]
    return [] if old == new else [f"{key}: {old!r} there, {new!r} here"]
