"""A run's folder: its config, manifest, cost ledger, logs and artifacts.

Every file is written to a temporary name and moved into place, so a reader, or a run that was
killed, sees it complete or not at all. JSON, YAML, safetensors and Arrow only: nothing is
unpickled.
"""

import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import yaml
from filelock import FileLock, Timeout
from pydantic import Field

from configs.files import (
    Shape,
    differences,
    read_json,
    read_sealed,
    read_text,
    read_yaml,
    require_shape,
    say,
    sha256_of_json,
    write_atomically,
    write_json,
    write_sealed,
)
from configs.schema import Config, LabError
from experiment.reading import check_config

SCHEMA = 4
METRICS = "metrics.jsonl"
STAGE = r"^[A-Za-z0-9_-][\w.+-]*(/[A-Za-z0-9_-][\w.+-]*)*$"  # never a path out of the run
DAMAGED = "restore it, or train again under another name=..."


class StageEntry(Shape):
    """A finished stage in the manifest, with the hashes of its cost in ledger.json and of its log
    in metrics.jsonl."""

    finished: str
    sha256: str
    cost: str
    log: str


class Manifest(Shape):
    """manifest.json: what the run made, in which environments, from which config and data."""

    started: str
    finished: str | None
    config: str
    environment: dict[str, Any] | None = None
    earlier_environments: list[dict[str, Any]] | None = None
    data: dict[str, str] | None = None
    splits: dict[str, str] | None = None
    pretrained: dict[str, str] | None = None
    stages: dict[Annotated[str, Field(pattern=STAGE)], StageEntry]
    overlap: float | None = None
    heldout_reads: int = 0
    load_of_others: float | None = None


class Cost(Shape):
    """A row of ledger.json."""

    stage: str
    flops: float
    seconds: float


class LogLine(Shape):
    """A line of metrics.jsonl."""

    stage: str
    step: int
    loss: float


# Keys that may change while a run is resumed: they decide how far it gets, not what it makes.
ADJUSTABLE = ("teacher.api.budget_", "teacher.api.at_once")


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
            differing = differences(run.reload().config().model_dump(mode="json"), settings)
            others = [key for key in differing if not key.startswith(ADJUSTABLE)]
            if others:
                raise LabError(
                    f"{folder} was made with another config ({others[0]}); "
                    "give this one another name=..., or delete the folder"
                )
            if differing:
                run.write_config(settings)
            run.reopen_missing_stages()
        else:
            begun = {"manifest.json", "ledger.json"}  # left by a start that was killed
            if any(p.name not in begun and p.name[:4] != "run." for p in folder.glob("[!.]*")):
                raise LabError(f"{folder} exists and is not a run; choose another name=...")
            run.manifest = {
                "schema": SCHEMA,
                "started": now(),
                "finished": None,
                "stages": {},
            }
            run.write_config(settings)
        if not run.manifest["finished"]:
            run.record_environment(environment)
            run.save()
        return run

    @classmethod
    def finished(cls, folder: str | Path) -> "Run":
        """Open a finished run for reading. LabError if it is missing, unfinished or of another
        schema."""
        run, by_name = cls(folder), cls(Path("runs") / folder)
        if not run.folder.is_dir() and by_name.folder.is_dir():
            run = by_name
        if not run.folder.is_dir():
            raise LabError(f"no run folder {run.folder}; train.py CONFIG makes one under runs/")
        run.reload()
        if not run.manifest["finished"]:
            raise LabError(f"{run.folder} is not finished; run train.py on its config to resume")
        run.metrics()  # a log that was changed is rejected before the work, not after it
        return run

    def reload(self) -> "Run":
        """Read manifest and ledger again. LabError if they are damaged or of another schema."""
        file, ledger = self.folder / "manifest.json", self.folder / "ledger.json"
        schema = read_json(file, dict, DAMAGED).get("schema")
        if schema != SCHEMA:
            raise LabError(
                f"{self.folder} has schema {schema}, this version reads {SCHEMA}; train it again "
                "under another name=..."
            )
        self.manifest = read_sealed(file, Manifest, DAMAGED)
        stages, rows = self.manifest["stages"], read_json(ledger, list[Cost], DAMAGED)
        # A run that was killed may have charged a stage that its manifest does not know yet.
        self.ledger = [row for row in rows if row["stage"] in stages]
        costs = {row["stage"]: row for row in self.ledger}
        for stage, made in stages.items():
            if made["cost"] != sha256_of_json(costs.get(stage)):
                raise LabError(
                    f"{ledger}: the cost of {stage} was changed after it was written; {DAMAGED}"
                )
        return self

    def reopen_missing_stages(self) -> None:
        """Make stages again whose folder was deleted, as damaged ones should be."""
        stages = self.manifest["stages"]
        for stage in [stage for stage in stages if not (self.folder / stage).is_dir()]:
            say(f"{self.folder / stage} is missing: it is made again")
            del stages[stage]
            self.manifest["finished"] = None

    def write_config(self, settings: dict[str, Any]) -> None:
        self.manifest["config"] = sha256_of_json(settings)
        self.save()
        text = yaml.safe_dump(settings, sort_keys=False, width=100)
        write_atomically(self.folder / "config.yaml", text)

    def record_environment(self, here: dict[str, Any]) -> None:
        """Record where the run continues. The previous environment is kept if it made a stage, or a
        part of one."""
        before = self.manifest.get("environment")
        begun = any(self.folder.glob("checkpoints/*")) or any(self.folder.glob("outputs/*"))
        if before and (self.manifest["stages"] or begun):
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
        config = check_config(read_yaml(read_text(file), str(file)), str(file))
        if sha256_of_json(config.model_dump(mode="json")) != self.manifest["config"]:
            raise LabError(f"{file} is not the config that this run was started with; {DAMAGED}")
        return config

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
        write_sealed(self.folder / "manifest.json", self.manifest)  # last: a stage in it is done

    def stage_done(self, stage: str) -> bool:
        return stage in self.manifest["stages"]

    def record_stage(self, stage: str, cost: dict[str, Any], artifact: dict[str, Any]) -> None:
        """Record a finished stage: its cost in the ledger, its artifact in the manifest, its log in
        metrics.jsonl. Its checkpoints are removed."""
        self.ledger = [row for row in self.ledger if row["stage"] != stage]
        self.ledger.append({"stage": stage, **cost})
        lines = self.log_of(stage)
        write_lines(self.folder, [*self.metrics(), *lines])
        self.manifest["stages"][stage] = {
            **{key: self.manifest["environment"].get(key) for key in ("code", "commit")},
            **artifact,
            "finished": now(),
            "cost": sha256_of_json(self.cost_of(stage)),
            "log": sha256_of_json(lines),
        }
        self.save()
        shutil.rmtree(self.checkpoints(stage), ignore_errors=True)

    def find_stage(self, stage: str, made_from: str) -> "Iterator[Run]":
        """Sibling runs with a finished stage of this name, made from the same inputs by the same
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
                yield other

    def copy_stage(self, stage: str, other: "Run") -> None:
        """Copy a finished stage of another run: files, cost, log and environment."""
        partial = self.folder / f".{stage.replace('/', '-')}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(other.folder / stage, partial)
        (self.folder / stage).parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial, self.folder / stage)
        cost = {k: v for k, v in other.cost_of(stage).items() if k != "stage"}
        log = [line for line in other.metrics() if line["stage"] == stage]
        write_lines(self.checkpoints(stage), log)
        self.keep_environment(other.manifest["environment"], self.manifest["environment"])
        made = {**other.manifest["stages"][stage], "copied_from": other.folder.name}
        self.record_stage(stage, {**cost, "copied_from": other.folder.name}, made)

    def close(self, load_of_others: float | None = None) -> None:
        """load_of_others: of the machine, where it was measured; of the last part if resumed."""
        self.manifest["finished"] = now()
        if load_of_others is not None:
            self.manifest["load_of_others"] = round(load_of_others, 3)
        self.save()

    def cost_of(self, stage: str) -> dict[str, Any]:
        return next(row for row in self.ledger if row["stage"] == stage)

    def log(self, stage: str, **line: Any) -> None:
        """Append a line to the log of a stage in progress."""
        folder = self.checkpoints(stage)
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": stage, **line}) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The log of all finished stages. LabError if it was changed."""
        stages, lines = self.manifest["stages"], read_lines(self.folder)
        for stage, made in stages.items():
            if made["log"] != sha256_of_json([line for line in lines if line["stage"] == stage]):
                raise LabError(
                    f"{self.folder / METRICS}: the log of {stage} was changed after it was "
                    f"written; {DAMAGED}"
                )
        return [line for line in lines if line["stage"] in stages]

    def log_of(self, stage: str) -> list[dict[str, Any]]:
        """The log of a stage in progress."""
        return read_lines(self.checkpoints(stage))

    def forget_log(self, stage: str, after: int, expected: str | None) -> None:
        """Drop lines logged after the checkpoint that a stage resumes from, which knows the hash of
        the lines before. LabError if they were changed."""
        kept = [line for line in self.log_of(stage) if line["step"] <= after]
        if expected and sha256_of_json(kept) != expected:
            folder = self.checkpoints(stage)
            raise LabError(
                f"{folder / METRICS} was changed after it was written; move {folder} elsewhere and "
                "run train.py on the config again"
            )
        write_lines(self.checkpoints(stage), kept)


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of a log, without a last one that was cut off. LabError if it is damaged."""
    file = folder / METRICS
    lines = read_text(file).split("\n") if file.exists() else []
    try:
        read = [json.loads(line) for line in lines if line.endswith("}")]
    except (ValueError, RecursionError) as error:
        raise LabError(f"{file} is damaged ({error}); {DAMAGED}") from None
    require_shape(read, list[LogLine], str(file), DAMAGED)
    return read


def write_lines(folder: Path, lines: list[dict[str, Any]]) -> None:
    write_atomically(folder / METRICS, "".join(json.dumps(line) + "\n" for line in lines))
