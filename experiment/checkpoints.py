"""Checkpoints of a training in progress: complete, verified when read, the last two kept."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save_file
from torch import nn

from configs.files import Shape, differences, flush_to_disk, require_shape, say
from configs.schema import LabError


class Meta(Shape):
    """What a checkpoint holds besides tensors: its step, the FLOPs and cost so far, the hash of the
    log so far, and the training it belongs to."""

    step: int
    flops: float
    cost: dict[str, Any]
    log: str
    of: dict[str, Any]


def checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: dict[str, Any],
    belongs_to: dict[str, Any],
) -> None:
    """Save the weights, both moments of AdamW, the step, `progress` (see `Meta`), and which
    training they belong to. The order of the data follows from the step."""
    tensors = {f"model/{name}": p for name, p in model.named_parameters()}
    for key in ("exp_avg", "exp_avg_sq"):
        tensors |= {
            f"{key}/{name}": optimizer.state[p][key] for name, p in model.named_parameters()
        }
    save_checkpoint(folder, step, tensors, {**progress, "of": belongs_to})


def restore(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, belongs_to: dict[str, Any]
) -> dict[str, Any] | None:
    """Load the newest checkpoint; returns its step and progress. LabError if it belongs to another
    training."""
    found = load_checkpoint(folder)
    if found is None:
        return None
    tensors, meta = found
    require_shape(meta, Meta, f"the checkpoint in {folder}")
    differing = differences(meta.get("of"), belongs_to)
    if differing:
        raise LabError(
            f"the checkpoint in {folder} belongs to another training ({differing[0]}); move that "
            "folder elsewhere and run train.py on the config again"
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model/{name}"])
            optimizer.state[parameter] = {
                "step": torch.tensor(float(meta["step"]), device=parameter.device),
                "exp_avg": tensors[f"exp_avg/{name}"].to(parameter.device),
                "exp_avg_sq": tensors[f"exp_avg_sq/{name}"].to(parameter.device),
            }
    return meta


def save_checkpoint(folder: Path, step: int, tensors: dict[str, torch.Tensor], meta: dict) -> None:
    """Write a checkpoint whose name carries the hash of its content; keep the last two."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / ".partial"
    save_file(tensors, partial, metadata={"lab": json.dumps({"step": step, **meta})})
    flush_to_disk(partial)
    digest = hashlib.sha256(partial.read_bytes()).hexdigest()[:16]
    os.replace(partial, folder / f"step-{step:08d}.{digest}.safetensors")
    for old in sorted(folder.glob("step-*.safetensors"))[:-2]:
        old.unlink()


def load_checkpoint(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """The newest undamaged checkpoint, or None; prints a line for every damaged one."""
    damaged = False
    for file in sorted(folder.glob("step-*.safetensors"), reverse=True):
        content = file.read_bytes()
        if hashlib.sha256(content).hexdigest()[:16] != file.name.split(".")[1]:
            say(f"checkpoint {file} is damaged (sha256 differs); resuming from the one before it")
            damaged = True
            # Renamed: it must not count as one of the two to keep, but may explain the damage.
            os.replace(file, file.with_name(f"damaged-{file.name}"))
            continue
        header = int.from_bytes(content[:8], "little")
        meta = json.loads(json.loads(content[8 : 8 + header])["__metadata__"]["lab"])
        return load(content), meta
    if damaged:
        say(f"every checkpoint in {folder} is damaged; the stage starts again")
    return None
