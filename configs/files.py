"""Reading and writing files: atomically, as JSON or YAML, and with one clear line on failure."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import yaml

from configs.schema import LabError


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


def read_json(path: Path) -> Any:
    """LabError if the file is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LabError(f"no {path}; is this the folder of a run that train.py made?") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LabError(f"{path} is damaged ({error}); run train.py on its config again") from None


def read_text(file: Path) -> str:
    """LabError if a file is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise LabError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start})") from None


def read_yaml(text: str, source: str) -> Any:
    """Plain YAML only: no tags that build objects, no aliases that expand without bound."""
    try:
        for event in yaml.parse(text, yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise LabError(f"{source}: YAML aliases (*{event.anchor}) are not accepted")
        return yaml.safe_load(text)
    except (ValueError, RecursionError) as error:  # a 13th month, a thousand brackets
        what = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise LabError(f"{source}: not plain YAML: {what}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise LabError(
            f"{source}: not plain YAML{where}: {getattr(error, 'problem', None) or error}"
        ) from None


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
