"""Configs: any input is read, or rejected in one line."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import train
from configs.files import read_yaml
from configs.schema import Config, LabError, Schedule, extremes, value_at
from experiment.reading import check_config, config_file, read_config
from tests.helpers import ROOT, TINY

READ = read_config(TINY)


def read_or_error(read: Callable, *arguments: object) -> object:
    """What was read, or the error message."""
    try:
        return read(*arguments)
    except LabError as error:
        return str(error)


def keys(section: dict, above: str = "") -> list[str]:
    """`a.b` for every key of a nested config."""
    found = []
    for name, value in section.items():
        found.append(f"{above}{name}")
        if isinstance(value, dict):
            found += keys(value, f"{above}{name}.")
    return found


def numbers(value: object) -> list[float]:
    """Every number of a nested config, except the free-form settings of transformers."""
    if isinstance(value, dict):
        return [n for name, v in value.items() if name != "settings" for n in numbers(v)]
    if isinstance(value, list | tuple):
        return [n for v in value for n in numbers(v)]
    return [value] if isinstance(value, float) else []


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.one_of(st.integers(), st.floats(), st.text(max_size=4)), max_size=3),
    st.dictionaries(st.text(max_size=6), st.one_of(st.integers(), st.text(max_size=4)), max_size=3),
)


@given(st.sampled_from(keys(READ.model_dump(mode="json"))), VALUES)
@settings(deadline=None, max_examples=300)
def test_any_value_at_any_key_is_read_or_rejected_in_one_line(key, value):
    settings = READ.model_dump(mode="json")
    *parents, last = key.split(".")
    place = settings
    for parent in parents:
        place = place[parent]
    place[last] = value
    found = read_or_error(check_config, settings, "here")
    if isinstance(found, Config):
        assert all(math.isfinite(number) for number in numbers(found.model_dump()))
    else:
        assert found.startswith("here: ")
        assert len(found.splitlines()) == 1 or "\n" in str(value)


@given(st.one_of(st.text(max_size=60), VALUES.map(yaml.safe_dump)))
@settings(deadline=None, max_examples=300)
def test_any_text_is_plain_yaml_or_rejected(text):
    read_or_error(read_yaml, text, "here")  # no other exception, and nothing is built


@given(st.sampled_from(keys(READ.model_dump(mode="json"))), st.text(max_size=20))
@settings(deadline=None, max_examples=200)
def test_any_override_is_read_or_rejected(key, value):
    assert isinstance(read_or_error(read_config, TINY, [f"{key}={value}"]), Config | str)


def test_what_is_written_into_a_run_reads_back_as_the_same_config():
    for file in sorted((ROOT / "configs").glob("*.yaml")):
        config = read_config(file)
        text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        assert check_config(read_yaml(text, "back"), "back") == config


def test_a_key_with_a_line_end_in_it_is_rejected_in_one_line():
    settings = read_yaml(Path(TINY).read_text("utf-8"), "tiny")
    settings["recipes"]["written"]["objective"] = {"\x1e": ""}
    with pytest.raises(LabError) as error:
        check_config(settings, "here")
    assert len(str(error.value).splitlines()) == 1


def test_a_schedule_goes_straight_to_its_end_and_stays_there():
    schedule = Schedule(start=0.6, end=0.2, until=0.5)
    found = [value_at(schedule, progress) for progress in (0, 0.25, 0.5, 0.9)]
    assert found == pytest.approx([0.6, 0.4, 0.2, 0.2])
    assert extremes(schedule) == pytest.approx((0.2, 0.6))
    assert value_at(0.7, 0.3) == 0.7
    assert extremes(0.7) == (0.7, 0.7)


@given(st.floats(0, 10), st.floats(0, 10), st.floats(0.01, 1), st.floats(0, 1))
def test_a_schedule_never_leaves_the_range_of_its_ends(start, end, until, progress):
    low, high = sorted((start, end))
    found = value_at(Schedule(start=start, end=end, until=until), progress)
    assert low - 1e-9 <= found <= high + 1e-9
    assert math.isfinite(found)


def test_a_missing_config_suggests_the_nearest(capsys):
    assert train.main([str(ROOT / "configs" / "tinny.yaml")]) == 2
    assert "did you mean 'tiny.yaml'?" in capsys.readouterr().err
    with pytest.raises(LabError, match=r"no config file quikstart; did you mean 'quickstart'\?"):
        read_config("quikstart")


def test_a_config_that_is_not_text_is_rejected(tmp_path, capsys):
    (tmp_path / "bad.yaml").write_bytes(b"name: \xff\xfe")
    assert train.main([str(tmp_path / "bad.yaml")]) == 2
    assert "is not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds nothing, expected keys and values as in configs/quickstart.yaml"),
        ("- a\n", "holds list, expected keys and values"),
        ("name: x\n\tseeds: [0]\n", "at line 2: a tab, which YAML does not accept; indent with"),
        ("name: x\nname: y\n", "the key 'name' is given twice"),
    ],
)
def test_what_is_no_config_says_what_it_is(content, message, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(content, "utf-8")
    with pytest.raises(LabError, match=message):
        read_config(file)


def test_a_config_is_found_by_its_name_alone(tmp_path, monkeypatch):
    assert read_config("tiny") == READ
    monkeypatch.chdir(tmp_path)
    assert config_file("tiny") == ROOT / "configs" / "tiny.yaml"
    Path("tiny").touch()
    assert config_file("tiny") == Path("tiny")
    assert config_file("quick") == Path("quick")
    assert config_file("elsewhere/tiny") == Path("elsewhere/tiny")
