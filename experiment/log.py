"""The log of a run in progress: progress bars, log lines, metrics.jsonl, the learning curve."""

import multiprocessing
import time
from collections.abc import Callable
from types import TracebackType

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.text import Text
from torch import nn
from tqdm import tqdm

from configs.files import printable, read_sealed, write_sealed
from experiment.command import command_line
from experiment.cost import Elapsed
from experiment.experiment import Experiment
from experiment.run import Run
from models.language import logits_at
from models.rows import Rows, collate
from student import chunked
from student.objectives import cross_entropy
from tasks.task import Task
from teacher.signal import Signal
from teacher.source import Source

RECORD_SECONDS = 2.0  # how often the time spent on outputs is recorded
VALIDATIONS = 10  # points of a learning curve
VALIDATION_ROWS = 256  # the same for all models; twice as many would slow a small training by 3 %
VALIDATION_BATCH = 64  # larger ones leave a CPU's cache and take longer


class TrainingLog:
    """The log of one stage: a progress bar, and lines on screen and in metrics.jsonl."""

    def __init__(
        self,
        run: Run,
        stage: str,
        task: Task,
        validation: Rows,
        steps: int | None,  # None: training ends with the FLOPs budget
        first: int,
        progress: float,
        track: Callable[[dict[str, float], int], None] = lambda values, step: None,
    ) -> None:
        self.track = track
        self.run, self.stage, self.task, self.validation = run, stage, task, validation
        self.steps, self.every = steps, run.config().log_every
        self.validations = validations_by(progress)
        self.losses: list[torch.Tensor] = []
        self.tokens, self.started = 0, time.perf_counter()
        self.bar = tqdm(
            total=steps,
            initial=first,
            desc=stage,
            unit="step",
            ascii=True,
            leave=False,
            disable=True if multiprocessing.parent_process() else None,
        )

    def record(
        self,
        step: int,
        progress: float,
        model: nn.Module,
        loss: torch.Tensor,
        norm: torch.Tensor,
        flops: float,
        tokens: int,
    ) -> bool:
        """After `step` steps: write a line if one is due; returns whether it was."""
        self.bar.update()
        self.losses.append(loss)
        self.tokens += tokens
        if step % self.every and progress < 1 and step > 1:  # the self-check reads the first loss
            return False
        loss = float(torch.stack(self.losses).mean())
        speed = self.tokens / (time.perf_counter() - self.started)
        line = {"loss": loss, "grad_norm": float(norm), "flops": flops, "tokens_per_s": speed}
        end = f"/{self.steps:<5}" if self.steps else f" {min(1.0, progress):>5.0%}"
        name = self.stage.removeprefix("students/")
        text = f"{name:<24} {step:>5}{end} loss {loss:.4f} {speed:>6.0f} tok/s"
        if validations_by(progress) > self.validations:
            line["validation_nll"] = validation_nll(model, self.task, self.validation)
            text += f" validation {line['validation_nll']:.4f}"
            self.validations = validations_by(progress)
        self.run.log(self.stage, step=step, **line)
        self.track({f"{self.stage}/{key}": value for key, value in line.items()}, step)
        tqdm.write(text)
        self.losses, self.tokens, self.started = [], 0, time.perf_counter()
        return True

    def close(self) -> None:
        self.bar.close()


def validations_by(progress: float) -> int:
    return int(VALIDATIONS * progress + 1e-9)


@torch.no_grad()
def validation_nll(model: nn.Module, task: Task, rows: Rows) -> float:
    """Nats per answer token on the validation rows with the lowest ids (which are hashes)."""
    model.eval()
    chosen = np.argsort(rows.ids)[:VALIDATION_ROWS]
    chosen = chosen[np.argsort(rows.lengths[chosen], kind="stable")]
    total, positions = 0.0, 0
    for indices in np.array_split(chosen, -(-len(chosen) // VALIDATION_BATCH)):
        batch = collate(rows, indices, task.pad)
        signal, vocabulary = Signal(batch.targets).to(model.device), task.vocabulary
        if chunked.pays(model, vocabulary):
            losses, _ = chunked.losses_in_chunks(model, batch, cross_entropy, signal, vocabulary)
        else:
            output = model(batch.input_ids.to(model.device), use_cache=False)
            losses = cross_entropy(logits_at(output, batch, vocabulary), signal)
        total += float(losses.sum())
        positions += len(losses)
    model.train()
    return total / positions


class OutputsLog:
    """The log of outputs being made: a progress bar, and the time that an interrupted part took."""

    def __init__(self, experiment: Experiment, stage: str, total: int, source: Source) -> None:
        self.source = source
        self.is_main, self.stage = experiment.is_main, stage
        self.file = experiment.run.checkpoints(stage) / "cost.json"
        before = read_sealed(self.file, Elapsed) if self.file.exists() else None
        self.watch, self.currency = experiment.stopwatch(before), experiment.config.cost.currency
        self.recorded = 0.0
        self.bar = tqdm(total=total, desc=stage, unit="row", ascii=True, leave=False, disable=None)

    def __enter__(self) -> "OutputsLog":
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()

    def progress(self, rows: int) -> None:
        """Count this many more rows."""
        self.bar.update(rows)
        if bill := self.source.bill():
            tokens = bill["prompt_tokens"] + bill["completion_tokens"]
            self.bar.set_postfix_str(f"{tokens:,} tokens, {bill['money']:.4f} {self.currency}")
        if self.is_main and self.watch.elapsed() - self.recorded >= RECORD_SECONDS:
            write_sealed(self.file, self.watch.read(0))
            self.recorded = self.watch.elapsed()


def print_summary(run: Run) -> None:
    """Print where things are, what they cost, and the next command."""
    minutes = sum(row["seconds"] for row in run.ledger) / 60
    bought = [row for row in run.ledger if "requests" in row]
    requests, tokens, money = (
        sum(row[key] for row in bought for key in keys)
        for keys in (("requests",), ("prompt_tokens", "completion_tokens"), ("money",))
    )
    currency = run.config().cost.currency
    bill = (
        f"bought     {requests:,} answers, {tokens:,} tokens, {money:.4f} {currency}\n"
        if bought
        else ""
    )
    text = (
        f"teacher    {run.teacher}\nstudents   {run.folder / 'students'}\n"
        f"cost       {run.folder / 'ledger.json'} ({minutes:.1f} minutes in all)\n{bill}\n"
        f"next: {command_line('eval.py', run.folder)}"
    )
    width = max(80, *(len(line) + 4 for line in text.splitlines()))  # commands stay on one line
    title = Text(f"trained {printable(run.folder)}")
    panel = Panel(Text(printable(text)), title=title, box=box.ASCII, expand=False)
    Console(width=width).print(panel)
