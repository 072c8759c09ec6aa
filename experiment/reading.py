"""Read a config: YAML with overrides on top, checked, or rejected in one line."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from configs.files import read_text, read_yaml
from configs.schema import Config, LabError, Section, nearest
from experiment.command import from_here
from experiment.rules import objections

CONFIGS = Path(__file__).parent.parent / "configs"
EXAMPLE = "configs/quickstart.yaml"


def read_config(
    path: str | Path, overrides: Sequence[str] = (), without: Sequence[str] = ()
) -> Config:
    """Read and check a YAML config, with `key.sub=value` overrides on top (values are YAML), and
    without some of its sections.

    Raises LabError with one line that names the file, the key, what was found and what to do.
    """
    path = config_file(path)
    if not path.is_file():
        known = [found.name for found in path.parent.glob("*.yaml")]
        if len(path.parts) == 1:
            known += [found.stem for found in CONFIGS.glob("*.yaml")]
        near = nearest(path.name, known)
        raise LabError(f"no config file {path}{near}")
    settings = read_yaml(read_text(path), str(path))
    if not isinstance(settings, dict):
        found = "nothing" if settings is None else type(settings).__name__
        raise LabError(f"{path} holds {found}, expected keys and values as in {EXAMPLE}")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise LabError(f"override {override!r} must read key=value, as in teacher.epochs=2")
        *parents, last = key.split(".")
        place = settings
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise LabError(f"override {override!r}: {parent!r} is a value, not a section")
        place[last] = read_yaml(value, f"override {override!r}")
    return check_config({k: v for k, v in settings.items() if k not in without}, str(path))


def check_config(settings: dict, source: str) -> Config:
    """Validate settings; LabError names the first wrong key, or the first rule broken."""
    try:
        config = Config.model_validate(settings)
    except ValidationError as error:
        message = explain(error.errors()[0])  # which may quote line breaks from the file
        raise LabError(f"{source}: {' '.join(message.splitlines())}") from None
    for key, value in misread(settings, config.model_dump()):
        raise LabError(f"{source}: {key}: found {str(value).lower()}, expected a number")
    for objection in objections(config):
        raise LabError(f"{source}: {' '.join(objection.splitlines())}")
    return config


def config_file(path: str | Path) -> Path:
    """A config that is given by its name alone is one of those in configs/."""
    path, named = Path(path), CONFIGS / f"{path}.yaml"
    is_name = len(path.parts) == 1 and not path.suffix and not path.exists()
    return Path(from_here(named)) if is_name and named.is_file() else path


def misread(given: Any, read: Any, key: str = "") -> Iterator[tuple[str, bool]]:
    """(key, value) of every true or false that was read as a number."""
    if isinstance(given, bool) and isinstance(read, int | float) and not isinstance(read, bool):
        yield key, given
    elif isinstance(given, dict) and isinstance(read, dict):
        for name in given.keys() & read.keys():
            yield from misread(given[name], read[name], f"{key}.{name}".strip("."))
    elif isinstance(given, list) and isinstance(read, list | tuple):
        for number, (one, other) in enumerate(zip(given, read, strict=False)):
            yield from misread(one, other, f"{key}.{number}")


def explain(error: Any) -> str:
    """One pydantic error as one line: the key, what was found, what was expected."""
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        *parents, last = error["loc"]
        section: Any = Config
        for parent in parents:
            section = section_of(section, str(parent))
        known = list(section.model_fields) if section else []
        near = nearest(str(last), known) or f"; known here: {', '.join(known)}"
        return f"unknown key {key!r}{near}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{key}: {message}" if key else message
    if error["type"] == "string_pattern_mismatch":
        return f"{key}: found {error['input']!r}, expected letters, digits, '.', '_' and '-' only"
    if error["type"] == "too_short":
        return f"{key}: found {error['input']!r}, expected at least {error['ctx']['min_length']}"
    if error["type"] == "missing":
        return f"{key}: missing; this key is needed"
    return f"{key}: found {error['input']!r}; {message[0].lower()}{message[1:]}"


def section_of(section: Any, key: str) -> Any:
    """The schema class under `key`, through dicts and lists of sections."""
    if section is None or key not in getattr(section, "model_fields", {}):
        return section  # the name of a recipe, or an index in a list
    annotation = section.model_fields[key].annotation
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    for candidate in candidates:
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None
