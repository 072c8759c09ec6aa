"""A learner's functions, called by the checks: in this process or, for grading, in another one.

In another process, a check sees only the values that a function returns: a submission cannot
change a check, end it, or print a result of its own.
"""

import base64
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from labs.sandbox import Limits, limited_command

ROOT = Path(__file__).parent.parent


class SubmissionError(Exception):
    """What a learner's function raised, or that it took too long."""


def load_module(file: Path) -> ModuleType:
    """A lab's file as a module. SubmissionError if it cannot be imported."""
    spec = importlib.util.spec_from_file_location(f"lab_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        raise SubmissionError(f"{file.name} cannot be imported: {described(error)}") from None
    return module


def described(error: BaseException) -> str:
    """An error in one line, with the line of the learner's file where it happened."""
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if "lab" in Path(f.filename).name
    ]
    where = f" (line {frames[-1].lineno})" if frames else ""
    if isinstance(error, NotImplementedError):
        return f"not written yet: {error}"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{where}"


def value_and_grad(function: Callable[..., Tensor], *arguments: Any) -> list[Tensor | None]:
    """[value of a scalar function, its gradient by each argument]; None where there is none."""
    given = [
        a.clone().requires_grad_(a.is_floating_point()) if isinstance(a, Tensor) else a
        for a in arguments
    ]
    value = function(*given)
    if not isinstance(value, Tensor) or value.ndim:
        raise ValueError(f"expected a scalar tensor, found {shape_of(value)}")
    if value.requires_grad:
        value.backward()
    return [value.detach(), *(a.grad if isinstance(a, Tensor) else None for a in given)]


def shape_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    return f"{type(value).__name__}"


class Local:
    """A learner's file, imported into this process."""

    def __init__(self, file: Path) -> None:
        self.module = load_module(file)

    def close(self) -> None:
        pass

    def call(self, name: str, *arguments: Any) -> Any:
        """The value of a function. SubmissionError for what it raises."""
        return self.guarded(lambda: getattr(self.module, name)(*arguments))

    def grad(self, name: str, *arguments: Any) -> list[Tensor | None]:
        """[value, gradient by each argument] of a scalar function. SubmissionError for what it
        raises."""
        return self.guarded(lambda: value_and_grad(getattr(self.module, name), *arguments))

    def read(self, name: str) -> Any:
        """A constant of the file."""
        return self.guarded(lambda: getattr(self.module, name))

    def guarded(self, work: Callable[[], Any]) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a learner's are no failed check
                return work()
        except BaseException as error:
            raise SubmissionError(described(error)) from None


class Remote:
    """A learner's file in a process with limits on time, memory, files and network."""

    def __init__(self, file: Path, limits: Limits) -> None:
        self.limits, self.folder = limits, tempfile.TemporaryDirectory(prefix="lab-")
        copy = Path(self.folder.name) / file.name
        copy.write_bytes(file.read_bytes())
        self.process = subprocess.Popen(
            limited_command([sys.executable, "-m", "labs.worker", str(copy)], limits, copy.parent),
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env=environment(copy.parent), start_new_session=True,
        )  # fmt: skip
        try:
            self.ask({"import": None})
        except SubmissionError:
            self.close()
            raise

    def close(self) -> None:
        self.limits.end(self.process)
        self.folder.cleanup()

    def call(self, name: str, *arguments: Any) -> Any:
        return self.ask({"call": name, "arguments": encoded(list(arguments))})

    def read(self, name: str) -> Any:
        return self.ask({"read": name})

    def grad(self, name: str, *arguments: Any) -> list[Tensor | None]:
        return self.ask({"grad": name, "arguments": encoded(list(arguments))})

    def ask(self, request: dict[str, Any]) -> Any:
        line = self.limits.exchange(self.process, json.dumps(request).encode() + b"\n")
        if line is None:
            raise SubmissionError(
                f"it took longer than {self.limits.seconds:g} s, used more than "
                f"{self.limits.megabytes} MB, or ended the process"
            )
        try:
            reply = json.loads(line)
            if "error" in reply:
                raise SubmissionError(str(reply["error"])[:500])
            return decoded(reply["value"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise SubmissionError("it wrote something that is no reply") from None


def environment(folder: Path) -> dict[str, str]:
    """Of a submission: no keys of the grader's, one thread."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "SYSTEMROOT") if name in os.environ}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return kept | threads | {"HOME": str(folder), "TMPDIR": str(folder), "PYTHONPATH": str(ROOT)}


def encoded(value: Any) -> Any:
    """As JSON; a tensor as safetensors."""
    if isinstance(value, Tensor):
        content = save({"": value.detach().contiguous().cpu()})
        return {"tensor": base64.b64encode(content).decode()}
    if isinstance(value, dict):
        return {"dict": {str(key): encoded(part) for key, part in value.items()}}
    if isinstance(value, list | tuple):
        return [encoded(part) for part in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a {type(value).__name__} cannot be compared; expected tensors or numbers")


def decoded(value: Any) -> Any:
    if isinstance(value, dict) and "tensor" in value:
        return load(base64.b64decode(value["tensor"]))[""]
    if isinstance(value, dict):
        return {key: decoded(part) for key, part in value["dict"].items()}
    if isinstance(value, list):
        return [decoded(part) for part in value]
    return value


def one_thread() -> None:
    torch.set_num_threads(1)
