"""Packages without a build for this Python."""

import importlib.util
import subprocess
import sys
import sysconfig

import pytest

from experiment import install


class Failed:
    returncode = 1


@pytest.mark.parametrize("has_pip", [True, False])
def test_a_missing_package_is_installed_from_the_build_for_another_python(has_pip, monkeypatch):
    ran, find = [], importlib.util.find_spec
    monkeypatch.setattr(install, "BUILT_FOR", {"no_such_package": "3.13", "numpy": "3.13"})
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: has_pip if name == "pip" else find(name)
    )
    monkeypatch.setattr(subprocess, "run", lambda command, check: ran.append(command) or Failed)
    assert install.install_missing() == 1
    (command,) = ran  # numpy is there
    pip = [sys.executable, "-m", "pip"] if has_pip else ["uv", "pip"]
    assert command[: len(pip) + 1] == [*pip, "install"]
    assert command[command.index("--python-version") + 1] == "3.13"
    assert command[command.index("--target") + 1] == sysconfig.get_path("purelib")
    assert command[-1] == "no_such_package"
