"""A run's folder: where its files are, how they are written, and what happened in it.

Everything is written to a temporary name and moved into place, so a reader, or a run that was
killed, sees a file whole or not at all. JSON, YAML, safetensors and Arrow only: nothing here is
ever unpickled.
"""

import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout
from safetensors.torch import load_file

from configs.reading import check_config, read_text, read_yaml
from configs.schema import Config, LabError

SCHEMA = 1


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a small file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """LabError where the file is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LabError(f"no {path}; is this the folder of a run that train.py made?") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LabError(f"{path} is damaged ({error}); run train.py on its config again") from None


def sha256_of_tensors(tensors: dict[str, torch.Tensor]) -> str:
    """One hash over names, types, shapes and bytes: the same model has the same hash, whatever
    the bytes of its file (the order of safetensors metadata is not stable)."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def sha256_of_model(folder: Path) -> str:
    """The tensor hash of a saved model. LabError if its file is missing or damaged."""
    file = folder / "model.safetensors"
    try:
        return sha256_of_tensors(load_file(file))
    except FileNotFoundError:
        raise LabError(f"no {file}; run train.py on the config again") from None
    except Exception as error:
        raise LabError(
            f"{file} is damaged ({error}); delete {folder} and run train.py on the config again"
        ) from None


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class Run:
    """runs/<name>: config.yaml, manifest.json, ledger.json, metrics.jsonl and the artifacts."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest: dict[str, Any] = {}
        self.ledger: list[dict[str, Any]] = []

    # -- opening ------------------------------------------------------------------------------

    @classmethod
    def open(cls, folder: Path, config: Config, environment: dict[str, Any]) -> "Run":
        """Open or continue a run for training. LabError if the folder holds another config."""
        run = cls(folder)
        settings = config.model_dump(mode="json")
        if (folder / "config.yaml").exists():
            differing = differences(run.config().model_dump(mode="json"), settings)
            if differing:
                raise LabError(
                    f"{folder} was made with another config ({differing[0]}); "
                    "give this one another name=..., or delete the folder"
                )
            run.reload().check_schema()
            run.reopen_what_is_gone()
        else:
            begun = {"manifest.json", "ledger.json"}  # all there is if the very start was killed
            if any(p.name not in begun and p.name[:4] != "run." for p in folder.glob("[!.]*")):
                raise LabError(f"{folder} exists and holds no run; choose another name=...")
            run.manifest = {"schema": SCHEMA, "started": now(), "finished": None, "stages": {}}
            write_json(folder / "ledger.json", run.ledger)
            write_json(folder / "manifest.json", run.manifest)
            write_atomically(
                folder / "config.yaml", yaml.safe_dump(settings, sort_keys=False, width=100)
            )
        if not run.manifest["finished"]:
            run.note_environment(environment)
            run.save()
        return run

    @classmethod
    def finished(cls, folder: str | Path) -> "Run":
        """Open a finished run for reading. LabError if it is missing, half-written or too new."""
        run = cls(folder)
        if not run.folder.is_dir():
            raise LabError(f"no run folder {run.folder}; train.py CONFIG makes one under runs/")
        run.reload().check_schema()
        if not run.manifest.get("finished"):
            raise LabError(f"{run.folder} is not finished; run train.py on its config to go on")
        return run

    def reload(self) -> "Run":
        """Read the books anew. LabError if they are not those of a run."""
        self.manifest = read_json(self.folder / "manifest.json")
        self.ledger = read_json(self.folder / "ledger.json")
        books = isinstance(self.manifest, dict) and isinstance(self.ledger, list)
        stages = self.manifest.get("stages") if books else None
        if not isinstance(stages, dict):
            raise LabError(f"{self.folder}: its manifest.json and ledger.json are not a run's")
        for stage in stages:
            if not re.fullmatch(r"[A-Za-z0-9_-][\w.+-]*(/[A-Za-z0-9_-][\w.+-]*)*", stage):
                raise LabError(
                    f"{self.folder / 'manifest.json'}: {stage[:40]!r} is no stage of a run; train "
                    "again under another name=..."
                )
        return self

    def check_schema(self) -> None:
        """LabError if another version of this project made the run."""
        if self.manifest.get("schema") != SCHEMA:
            raise LabError(
                f"{self.folder} has schema {self.manifest.get('schema')}, this version reads "
                f"{SCHEMA}; train it again under another name=..."
            )

    def reopen_what_is_gone(self) -> None:
        """Stages whose folder somebody deleted, as damaged ones should be, are to be done again."""
        stages = self.manifest["stages"]
        for stage in [stage for stage in stages if not (self.folder / stage).is_dir()]:
            print(f"{self.folder / stage} is gone: it is made again")
            del stages[stage]
            self.manifest["finished"] = None

    def note_environment(self, here: dict[str, Any]) -> None:
        """Where the run goes on. What it was before is kept if it made any stage in another one."""
        before = self.manifest.get("environment")
        if before and self.manifest["stages"] and differences(before, here):
            self.manifest.setdefault("earlier_environments", []).append(before)
        self.manifest["environment"] = here

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder against a second writer. The lock goes with the process that has it."""
        lock = FileLock(self.folder / "run.lock")
        self.folder.mkdir(parents=True, exist_ok=True)
        holder = self.folder / "run.holder"
        try:
            lock.acquire(timeout=0)
        except Timeout:
            who = holder.read_text(encoding="utf-8") if holder.exists() else "another process"
            raise LabError(f"{self.folder} is in use by {who.strip()}; wait, or stop it") from None
        try:
            write_atomically(holder, f"process {os.getpid()} on {socket.gethostname()}\n")
            yield
        finally:
            holder.unlink(missing_ok=True)
            lock.release()

    def config(self) -> Config:
        file = self.folder / "config.yaml"
        if not file.is_file():
            raise LabError(f"no {file}; is this the folder of a run that train.py made?")
        return check_config(read_yaml(read_text(file), str(file)), str(file))

    # -- places -------------------------------------------------------------------------------

    @property
    def teacher(self) -> Path:
        return self.folder / "teacher"

    def checkpoints(self, stage: str) -> Path:
        """Where a stage under way keeps its checkpoints and its log."""
        return self.folder / "checkpoints" / stage.replace("/", "-")

    # -- what happened ------------------------------------------------------------------------

    def save(self) -> None:
        write_json(self.folder / "ledger.json", self.ledger)
        write_json(self.folder / "manifest.json", self.manifest)  # last: a stage in it is done

    def stage_done(self, stage: str) -> bool:
        return stage in self.manifest["stages"]

    def close_stage(self, stage: str, cost: dict[str, Any], artifact: dict[str, Any]) -> None:
        """Enter a finished stage: its cost in the ledger, its artifact in the manifest, its log in
        metrics.jsonl. Its checkpoints go."""
        self.ledger = [row for row in self.ledger if row["stage"] != stage]
        self.ledger.append({"stage": stage, **cost})
        lines = [line for line in self.metrics() if line["stage"] != stage]
        lines += self.metrics(self.checkpoints(stage))
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_atomically(self.folder / "metrics.jsonl", text)
        made = {key: self.manifest["environment"].get(key) for key in ("code", "commit")}
        self.manifest["stages"][stage] = {"finished": now(), **made, **artifact}
        self.save()
        shutil.rmtree(self.checkpoints(stage), ignore_errors=True)

    def close(self) -> None:
        self.manifest["finished"] = now()
        self.save()

    def cost_of(self, stage: str) -> dict[str, Any]:
        return next(row for row in self.ledger if row["stage"] == stage)

    def log(self, stage: str, **line: Any) -> None:
        """Append a line to the log of a stage that is under way."""
        folder = self.checkpoints(stage)
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": stage, **line}) + "\n")

    def metrics(self, folder: Path | None = None) -> list[dict[str, Any]]:
        """The log of the finished stages, or that in the folder of one under way."""
        file = (folder or self.folder) / "metrics.jsonl"
        lines = read_text(file).splitlines() if file.exists() else []
        try:
            return [json.loads(line) for line in lines if line.endswith("}")]  # a kill tears one
        except json.JSONDecodeError as error:
            raise LabError(
                f"{file} is damaged ({error}); train again under another name=..."
            ) from None

    def forget_metrics(self, stage: str, after: int) -> None:
        """Drop lines logged past the checkpoint that a stage goes on from."""
        folder = self.checkpoints(stage)
        kept = [line for line in self.metrics(folder) if line["step"] <= after]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_atomically(folder / "metrics.jsonl", text)


def differences(old: Any, new: Any, key: str = "") -> list[str]:
    """`key: old there, new here` for every leaf in which two nested dicts differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for name in dict.fromkeys([*old, *new])
            for line in differences(old.get(name), new.get(name), f"{key}.{name}".strip("."))
        ]
    return [] if old == new else [f"{key}: {old!r} there, {new!r} here"]
