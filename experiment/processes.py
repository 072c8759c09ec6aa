"""Several processes that train one model together: each computes a part of every step."""

import importlib.util
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from configs.schema import Config, LabError


def new_accelerator(config: Config, folder: Path) -> Accelerator:
    """Of this process, with the trackers of the config. LabError if one is not installed."""
    missing = [name for name in config.trackers if importlib.util.find_spec(name) is None]
    if missing:
        raise LabError(
            f"trackers: {missing[0]} is not installed; pip install {missing[0]}, or remove it"
        )
    return Accelerator(
        cpu=not torch.cuda.is_available(),
        log_with=config.trackers or None,
        project_dir=folder / "trackers" if config.trackers else None,
    )


def require_one_way_to_share(config: Config, accelerator: Accelerator) -> None:
    if accelerator.num_processes > 1 and config.workers > 1:
        raise LabError(
            f"{accelerator.num_processes} processes were launched and workers is {config.workers}: "
            "either several processes train one model, or each worker trains one; set workers=1"
        )


def require_rows_for_all(stage: str, rows: int, accelerator: Accelerator) -> None:
    if rows < accelerator.num_processes:
        raise LabError(
            f"{stage}: a batch of {rows} rows cannot be shared by {accelerator.num_processes} "
            "processes; launch fewer"
        )


def micro_batches(
    indices: np.ndarray, accumulation: int, accelerator: Accelerator
) -> list[np.ndarray]:
    """The micro-batches of a step that this process computes."""
    processes = accelerator.num_processes
    parts = np.array_split(indices, min(accumulation * processes, len(indices)))
    return parts[accelerator.process_index :: processes]


def sum_over_processes(
    accelerator: Accelerator, model: nn.Module, loss: torch.Tensor
) -> torch.Tensor:
    """Sum gradients over all processes, in place; returns the sum of their losses."""
    if accelerator.num_processes == 1:
        return loss
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([loss.view(1), *(gradient.view(-1) for gradient in gradients)])
    loss, *summed = accelerator.reduce(flat).split([1, *(g.numel() for g in gradients)])
    for gradient, total in zip(gradients, summed, strict=True):
        gradient.copy_(total.view_as(gradient))
    return loss[0]
