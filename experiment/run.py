"""A run's folder: its config, manifest, cost ledger, logs and artifacts.

Every file is written to a temporary name and moved into place, so a reader, or a run that was
killed, sees it complete or not at all. JSON, YAML, safetensors and Arrow only: nothing is
unpickled.
"""

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

import yaml
from filelock import FileLock, Timeout

from configs.files import (
    differences,
    read_json,
    read_text,
    read_yaml,
    write_atomically,
    write_json,
)
from configs.schema import Config, LabError
from experiment.reading import check_config

SCHEMA = 3


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
        """Open or resume a run for training. LabError if the folder holds another config."""
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
            run.reopen_missing_stages()
        else:
            begun = {"manifest.json", "ledger.json"}  # left by a start that was killed
            if any(p.name not in begun and p.name[:4] != "run." for p in folder.glob("[!.]*")):
                raise LabError(f"{folder} exists and is not a run; choose another name=...")
            run.manifest = {"schema": SCHEMA, "started": now(), "finished": None, "stages": {}}
            write_json(folder / "ledger.json", run.ledger)
            write_json(folder / "manifest.json", run.manifest)
            write_atomically(
                folder / "config.yaml", yaml.safe_dump(settings, sort_keys=False, width=100)
            )
        if not run.manifest["finished"]:
            run.record_environment(environment)
            run.save()
        return run

    @classmethod
    def finished(cls, folder: str | Path) -> "Run":
        """Open a finished run for reading. LabError if it is missing, unfinished or of another
        schema."""
        run = cls(folder)
        if not run.folder.is_dir():
            raise LabError(f"no run folder {run.folder}; train.py CONFIG makes one under runs/")
        run.reload().check_schema()
        if not run.manifest.get("finished"):
            raise LabError(f"{run.folder} is not finished; run train.py on its config to resume")
        return run

    def reload(self) -> "Run":
        """Read manifest and ledger again. LabError if they are not valid."""
        self.manifest = read_json(self.folder / "manifest.json")
        self.ledger = read_json(self.folder / "ledger.json")
        valid = isinstance(self.manifest, dict) and isinstance(self.ledger, list)
        stages = self.manifest.get("stages") if valid else None
        if not isinstance(stages, dict):
            raise LabError(f"{self.folder}: manifest.json and ledger.json are not those of a run")
        for stage in stages:
            if not re.fullmatch(r"[A-Za-z0-9_-][\w.+-]*(/[A-Za-z0-9_-][\w.+-]*)*", stage):
                raise LabError(
                    f"{self.folder / 'manifest.json'}: {stage[:40]!r} is not a stage of a run; "
                    "train again under another name=..."
                )
        return self

    def check_schema(self) -> None:
        """LabError if another version of this project made the run."""
        if self.manifest.get("schema") != SCHEMA:
            raise LabError(
                f"{self.folder} has schema {self.manifest.get('schema')}, this version reads "
                f"{SCHEMA}; train it again under another name=..."
            )

    def reopen_missing_stages(self) -> None:
        """Make stages again whose folder was deleted, as damaged ones should be."""
        stages = self.manifest["stages"]
        for stage in [stage for stage in stages if not (self.folder / stage).is_dir()]:
            print(f"{self.folder / stage} is missing: it is made again")
            del stages[stage]
            self.manifest["finished"] = None

    def record_environment(self, here: dict[str, Any]) -> None:
        """Record where the run continues. The previous environment is kept if it made a stage."""
        before = self.manifest.get("environment")
        if before and self.manifest["stages"]:
            self.keep_environment(before, here)
        self.manifest["environment"] = here

    def keep_environment(self, other: dict[str, Any], here: dict[str, Any]) -> None:
        """Keep another environment in which a stage of this run was made."""
        earlier = self.manifest.setdefault("earlier_environments", [])
        if differences(other, here) and other not in earlier:
            earlier.append(other)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep a second writer out of the folder; the lock ends with its process."""
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

    # -- paths --------------------------------------------------------------------------------

    @property
    def teacher(self) -> Path:
        return self.folder / "teacher"

    def checkpoints(self, stage: str) -> Path:
        """Where a stage in progress keeps its checkpoints and its log."""
        return self.folder / "checkpoints" / stage.replace("/", "-")

    # -- stages, cost and logs ----------------------------------------------------------------

    def save(self) -> None:
        write_json(self.folder / "ledger.json", self.ledger)
        write_json(self.folder / "manifest.json", self.manifest)  # last: a stage in it is done

    def stage_done(self, stage: str) -> bool:
        return stage in self.manifest["stages"]

    def record_stage(self, stage: str, cost: dict[str, Any], artifact: dict[str, Any]) -> None:
        """Record a finished stage: its cost in the ledger, its artifact in the manifest, its log in
        metrics.jsonl. Its checkpoints are removed."""
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

    def find_stage(self, stage: str, made_from: str) -> "Run | None":
        """A sibling run with a finished stage of this name, made from the same inputs by the same
        code."""
        code = self.manifest["environment"].get("code")
        for file in sorted(self.folder.parent.glob("*/manifest.json")):
            if file.parent == self.folder:
                continue
            try:
                other = Run(file.parent).reload()
            except LabError:
                continue  # not a valid run
            made = other.manifest["stages"].get(stage, {})
            same = made.get("made_from") == made_from and made.get("code") == code
            if same and (other.folder / stage).is_dir():
                return other
        return None

    def copy_stage(self, stage: str, other: "Run") -> None:
        """Copy a finished stage of another run: files, cost, log and environment."""
        partial = self.folder / f".{stage.replace('/', '-')}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(other.folder / stage, partial)
        (self.folder / stage).parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial, self.folder / stage)
        cost = {k: v for k, v in other.cost_of(stage).items() if k != "stage"}
        log = [line for line in other.metrics() if line["stage"] == stage]
        write_atomically(
            self.checkpoints(stage) / "metrics.jsonl",
            "".join(json.dumps(line) + "\n" for line in log),
        )
        self.keep_environment(other.manifest["environment"], self.manifest["environment"])
        made = {**other.manifest["stages"][stage], "copied_from": other.folder.name}
        self.record_stage(stage, {**cost, "copied_from": other.folder.name}, made)

    def close(self) -> None:
        self.manifest["finished"] = now()
        self.save()

    def cost_of(self, stage: str) -> dict[str, Any]:
        return next(row for row in self.ledger if row["stage"] == stage)

    def log(self, stage: str, **line: Any) -> None:
        """Append a line to the log of a stage in progress."""
        folder = self.checkpoints(stage)
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": stage, **line}) + "\n")

    def metrics(self, folder: Path | None = None) -> list[dict[str, Any]]:
        """The log of the finished stages, or of one in progress in its folder."""
        file = (folder or self.folder) / "metrics.jsonl"
        lines = read_text(file).splitlines() if file.exists() else []
        try:
            return [json.loads(line) for line in lines if line.endswith("}")]  # a kill cuts one
        except json.JSONDecodeError as error:
            raise LabError(
                f"{file} is damaged ({error}); train again under another name=..."
            ) from None

    def forget_metrics(self, stage: str, after: int) -> None:
        """Drop lines logged after the checkpoint that a stage resumes from."""
        folder = self.checkpoints(stage)
        kept = [line for line in self.metrics(folder) if line["step"] <= after]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_atomically(folder / "metrics.jsonl", text)
