"""Data that installed packages carry."""

import hashlib
import subprocess
import sys
import sysconfig

import pytest

from configs.schema import LabError
from tasks import packaged
from tasks.packaged import install_missing, packaged_file, read_verified


def test_a_text_is_the_same_with_the_line_ends_of_windows(tmp_path):
    text = b"a AH\nb B IY\n"
    (tmp_path / "dict").write_bytes(text.replace(b"\n", b"\r\n"))
    digest = hashlib.sha256(text).hexdigest()
    assert read_verified(tmp_path / "dict", digest, is_text=True) == text
    with pytest.raises(LabError, match="other data would silently give other rows"):
        read_verified(tmp_path / "dict", digest)


def test_a_package_that_is_missing_is_installed_from_the_build_for_another_python(monkeypatch):
    ran = []
    monkeypatch.setattr(packaged, "BUILT_FOR", {"no_such_package": "3.13", "numpy": "3.13"})
    monkeypatch.setattr(
        subprocess, "run", lambda command, check: ran.append(command) or FailedProcess
    )
    with pytest.raises(LabError, match=r"run python -m tasks\.packaged$"):
        packaged_file("no_such_package", "the words")
    assert install_missing() == 1
    (command,) = ran  # numpy is there
    assert command[:4] == [sys.executable, "-m", "pip", "install"]
    assert command[command.index("--python-version") + 1] == "3.13"
    assert command[command.index("--target") + 1] == sysconfig.get_path("purelib")
    assert command[-1] == "no_such_package"


class FailedProcess:
    returncode = 1
