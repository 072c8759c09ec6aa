"""Data shipped in installed packages: only the file is read, the package is not imported.

python -m experiment.install    # install those of them that have no build for this Python
"""

import hashlib
import importlib.util
from pathlib import Path

from configs.schema import LabError

INSTALL = "install the versions in constraints.txt"
INSTALL_ALL = "pip install -c constraints.txt -e ."
# Built for some versions of Python. Their code is not run, so the build for any of them will do.
BUILT_FOR = {"pocketsphinx": "3.13"}


def packaged_file(package: str, content: str, *parts: str) -> Path:
    """A file of a package that contains `content`. LabError if the package is not installed."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise LabError(
            f"the {package} package, which contains {content}, is not installed; run "
            f"{'python -m experiment.install' if package in BUILT_FOR else INSTALL_ALL}"
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
