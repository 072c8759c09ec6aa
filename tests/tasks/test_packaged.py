"""Data that installed packages carry."""

import hashlib

import pytest

from configs.schema import LabError
from tasks import packaged
from tasks.packaged import packaged_file, read_verified


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    with pytest.raises(LabError, match=r"run pip install -c constraints\.txt -e \.$"):
        packaged_file("no_such_package", "the words")
    monkeypatch.setattr(packaged, "BUILT_FOR", {"no_such_package": "3.13"})
    with pytest.raises(LabError, match=r"run python -m experiment\.install$"):
        packaged_file("no_such_package", "the words")


def test_a_text_is_the_same_with_the_line_ends_of_windows(tmp_path):
    text = b"a AH\nb B IY\n"
    (tmp_path / "dict").write_bytes(text.replace(b"\n", b"\r\n"))
    digest = hashlib.sha256(text).hexdigest()
    assert read_verified(tmp_path / "dict", digest, is_text=True) == text
    with pytest.raises(LabError, match="other data would silently give other rows"):
        read_verified(tmp_path / "dict", digest)
