"""Data shipped in installed packages: only the file is read, the package is not imported.

python -m tasks.packaged    # install those of them that have no build for this Python
"""

import hashlib
import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path

from configs.schema import LabError

INSTALL = "install the versions in constraints.txt"
CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"
INSTALL_ALL = "pip install -c constraints.txt -e ."
# Built for some versions of Python. Their code is not run, so the build for any of them will do.
BUILT_FOR = {"pocketsphinx": "3.13"}


def packaged_file(package: str, content: str, *parts: str) -> Path:
    """A file of a package that contains `content`. LabError if the package is not installed."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise LabError(
            f"the {package} package, which contains {content}, is not installed; run "
            f"{'python -m tasks.packaged' if package in BUILT_FOR else INSTALL_ALL}"
        )
    return Path(found.submodule_search_locations[0], *parts)


def read_verified(file: Path, sha256: str, is_text: bool = False) -> bytes:
    """The content of a file. LabError if its hash differs: it would silently give other rows.
    is_text: its lines may end as on Windows."""
    try:
        content = file.read_bytes()
    except OSError:
        raise LabError(f"no {file}; {INSTALL}") from None
    if is_text:
        content = content.replace(b"\r\n", b"\n")
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise LabError(
            f"{file} has sha256 {found[:16]}..., expected {sha256[:16]}...: other data would "
            f"silently give other rows; {INSTALL}"
        )
    return content


def install_missing() -> int:
    """The exit code of pip, which installs the build for another version of Python."""
    for package, python in BUILT_FOR.items():
        if importlib.util.find_spec(package) is None:
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
            command += ["--only-binary=:all:", "--python-version", python]
            command += ["--target", sysconfig.get_path("purelib"), "-c", str(CONSTRAINTS), package]
            code = subprocess.run(command, check=False).returncode
            if code:
                return code
    return 0


if __name__ == "__main__":
    sys.exit(install_missing())
