"""The state of a training: steps, FLOPs and cost, resumed from a checkpoint, logged and saved."""

import json
import math

import numpy as np
import torch
from torch import Tensor, nn

from configs.files import sha256_of_json, write_json
from configs.schema import LabError
from experiment.checkpoints import checkpoint, restore
from experiment.cost import TrainingFlops
from experiment.experiment import Experiment
from experiment.log import TrainingLog
from experiment.stages import StageResult, made_of, usage_of
from models.language import model_card, save_model, use_special_tokens
from models.rows import Rows
from student.hidden import student_of
from student.training_set import TrainingSet


class TrainingState:
    """Training for a number of steps or, with max_flops, for about that many: until the FLOPs are
    spent. Several processes hold the same state; the main one logs and saves."""

    def __init__(
        self,
        experiment: Experiment,
        stage: str,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        steps: int,
        lineage: str,
        max_flops: float | None = None,
        validation: Rows | None = None,
    ) -> None:
        self.experiment, self.stage, self.model, self.optimizer = (
            experiment,
            stage,
            model,
            optimizer,
        )
        self.steps, self.max_flops, self.lineage = steps, max_flops, lineage
        self.flops_with_projections = TrainingFlops(model)
        self.plain_flops = TrainingFlops(student_of(model))
        self.checkpoints = experiment.run.checkpoints(stage)
        self.belongs_to = {
            "stage": stage,
            "lineage": lineage,
            "steps": steps,
            "max_flops": max_flops,
            "model": json.loads(student_of(model).config.to_json_string()),
            "parameters": {name: list(p.shape) for name, p in model.named_parameters()},
        }
        before = restore(self.checkpoints, model, optimizer, self.belongs_to) or {}
        self.step, self.flops = before.get("step", 0), before.get("flops", 0.0)
        cost = before.get("cost")
        self.watch = experiment.stopwatch(cost)
        self.writing_seconds = (cost or {}).get("writing_seconds", 0.0)
        experiment.accelerator.wait_for_everyone()  # all processes read it before one writes again
        self.saved_at, self.saved_step = self.watch.elapsed(), self.step
        self.log = None
        if experiment.is_main:
            rows = experiment.validation if validation is None else validation
            total = None if max_flops else steps
            experiment.run.forget_log(stage, self.step, before.get("log"))
            self.log = TrainingLog(
                experiment.run,
                stage,
                experiment.task,
                rows,
                total,
                self.step,
                self.progress,
                experiment.accelerator.log,
            )

    @property
    def progress(self) -> float:
        """The fraction of the training that is done."""
        return self.flops / self.max_flops if self.max_flops else self.step / self.steps

    @property
    def schedule_step(self) -> float:
        """The step that sets the learning rate."""
        return self.progress * self.steps if self.max_flops else self.step

    def advance(
        self, data: TrainingSet, indices: np.ndarray, uses_hidden: bool, loss: Tensor, norm: Tensor
    ) -> None:
        """Count a step on these rows, log it, save a checkpoint if one is due."""
        lengths = data.rows.lengths_of(indices)
        flops = self.flops_with_projections if uses_hidden else self.plain_flops
        self.flops += data.flops + flops.of_batch(lengths)
        self.writing_seconds += data.writing_seconds
        self.step += 1
        if self.log is None:
            return
        learner = self.model if uses_hidden else student_of(self.model)
        tokens = len(indices) * int(lengths.max())
        logged = self.log.record(self.step, self.progress, learner, loss, norm, self.flops, tokens)
        # Only with a log line, so that a resumed run logs the same as an uninterrupted one.
        config = self.experiment.config
        due = (
            self.watch.elapsed() - self.saved_at > config.checkpoint_seconds
            or self.step - self.saved_step >= config.checkpoint_steps
        )
        if logged and due and self.progress < 1:
            cost = {**self.watch.read(self.flops), "writing_seconds": self.writing_seconds}
            log = sha256_of_json(self.experiment.run.log_of(self.stage))
            progress = {"flops": self.flops, "cost": cost, "log": log}
            checkpoint(
                self.checkpoints, self.step, self.model, self.optimizer, progress, self.belongs_to
            )
            self.saved_at, self.saved_step = self.watch.elapsed(), self.step

    def require_finite(self, loss: Tensor, norm: Tensor, ids: np.ndarray) -> None:
        """LabError if the loss or the gradient is not finite; the ids of the step's rows are saved,
        and the last checkpoint is kept."""
        if math.isfinite(loss) and math.isfinite(norm):
            return
        file = self.checkpoints / "nonfinite.json"
        if self.experiment.is_main:
            values = {"loss": str(float(loss)), "gradient_norm": str(float(norm))}
            where = {"stage": self.stage, "step": self.step + 1}
            write_json(file, {**where, **values, "rows": ids.tolist()})
        what = f"the norm of the gradient is {float(norm)}"
        if not math.isfinite(loss):
            what = f"the loss is {float(loss)}"
        raise LabError(
            f"{self.stage}: {what} at step {self.step + 1}; its rows are listed in {file}; lower "
            "learning_rate under another name=..., the checkpoint before it is kept"
        )

    def finish(self, data: TrainingSet) -> StageResult:
        """Save the model at <run>/<stage>; returns its cost and its manifest entry."""
        if self.log is None:
            return None
        self.log.close()
        model, folder = student_of(self.model), self.experiment.run.folder / self.stage
        if self.experiment.task.tokenizer is not None:
            use_special_tokens(model, self.experiment.task.tokenizer)
        usage = usage_of(self.experiment.task)
        card = model_card(self.stage, model, self.lineage, self.step, usage)
        save_model(model, self.experiment.task.tokenizer, folder, card)
        cost = {**self.watch.read(self.flops), "steps": self.step, "rows": len(data.rows)}
        if data.on_policy:
            cost["writing_seconds"] = round(self.writing_seconds, 3)
            cost["writing_share"] = round(self.writing_seconds / cost["seconds"], 3)
        return cost, made_of(folder, model)
