"""Where a result comes from: versions, machine, commit, command."""

import hashlib
import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import torch

from configs.schema import LabError
from tasks import TASKS

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "datasets",
    "accelerate",
    "numpy",
    *(task.package for task in TASKS.values() if task.package),
)
# What a commit must contain for a run to be reproduced.
CODE = (":/*.py", ":/configs", ":/constraints.txt", ":/pyproject.toml")


def environment(threads: int, workers: int = 1, processes: int = 1) -> dict[str, Any]:
    """What a rerun needs to know."""
    return {
        "python": platform.python_version(),
        "packages": {name: version_of(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cores": os.cpu_count(),
        "threads": threads,
        "workers": workers,
        "processes": processes,
        "code": code_sha256(),
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no", "--", *CODE)),
        "command": shlex.join(without_places([Path(sys.argv[0]).name, *sys.argv[1:]])),
    }


def without_places(arguments: list[str]) -> list[str]:
    """Absolute paths are reduced to their names: results are read on other machines."""
    return [Path(a).name if Path(a).is_absolute() else a for a in arguments]


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def print_environment() -> int:
    """Whether this machine is set up, a line each; 0 if it is, else 1."""
    facts = environment_facts()
    print("\n".join(f"{'[OK]' if good else '[FAIL]':<6} {fact}" for good, fact in facts))
    return 0 if all(good for good, _ in facts) else 1


def environment_facts() -> list[tuple[bool, str]]:
    """(whether it is as expected, fact) for everything that a bug report needs."""
    found = environment(torch.get_num_threads())
    facts = [
        (sys.version_info >= (3, 11), f"Python {found['python']} (3.11 or newer)"),
        (True, f"{found['platform']}, {found['cpu']}"),
    ]
    tested = tested_versions()
    for name, version in found["packages"].items():
        if version is None:
            facts.append((False, f"{name} is not installed; install what constraints.txt pins"))
            continue
        pinned = tested.get(name, version)
        same = version.split("+")[0] == pinned
        facts.append((same, f"{name} {version}" + ("" if same else f", tested with {pinned}")))
    threads = f"{found['threads']} threads on {found['cores']} cores"
    facts.append((found["threads"] <= (found["cores"] or 1), threads))
    gpu = found["gpu"] or "none (none is needed)"
    facts.append((True, f"GPU: {gpu}"))
    memory = psutil.virtual_memory().available / 2**30
    facts.append((memory > 2, f"{memory:.1f} GB of memory free (2 are needed)"))
    disk = shutil.disk_usage(Path.cwd()).free / 2**30
    facts.append((disk > 2, f"{disk:.1f} GB of disk free (2 are needed)"))
    facts.append((os.access(Path.cwd(), os.W_OK), f"{Path.cwd()} is writable"))
    for name, task in TASKS.items():
        if task.package:
            try:
                task()
                facts.append((True, f"task {name}: its data are the tested ones"))
            except LabError as error:
                facts.append((False, f"task {name}: {error}"))
    commit = found["commit"] or "no git checkout"
    facts.append((True, f"commit {commit}{', with changes' if found['dirty'] else ''}"))
    return facts


def tested_versions() -> dict[str, str]:
    """{package: version} of constraints.txt."""
    file = Path(__file__).parent.parent / "constraints.txt"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return dict(line.split("==") for line in lines if "==" in line)


ROOT = Path(__file__).parent.parent


def code_sha256() -> str:
    """The hash of the code that training runs: it ignores documentation and needs no git."""
    files = [ROOT / "train.py"]
    for folder in ("configs", "models", "tasks", "teacher", "student", "experiment"):
        files += sorted((ROOT / folder).glob("*.py"))
    return sha256_of_code(files)


def evaluation_sha256() -> str:
    """The hash of the additional code that an evaluation runs."""
    return sha256_of_code([ROOT / "eval.py", *sorted((ROOT / "measure").rglob("*.py"))])


def sha256_of_code(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(ROOT).as_posix()}\n".encode())
        digest.update(file.read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
