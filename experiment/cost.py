"""The cost of each stage: FLOPs, seconds, memory, joules and money.

FLOPs are counted by torch's FlopCounterMode on the real model and shapes, forward and backward,
not estimated as 6ND. Element-wise work and the optimiser are not counted (FlopCounterMode sees
matrix products), for teacher and student alike.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.cache_utils import CacheLayerMixin

import models.flops  # noqa: F401  its formulas count fused attention
from configs.files import Shape
from configs.schema import Cost
from models.generate import CACHES

RAPL = Path("/sys/class/powercap/intel-rapl:0/energy_uj")


# FLOPs per row of a training step, by the shape of the model and the tokens of the row
TRAINING_FLOPS: dict[tuple, dict[int, int]] = {}


class TrainingFlops:
    """FLOPs of forward and backward for one row of L tokens, counted once per L; models of the same
    shape share the counts.

    All matrix products of a step are linear in its rows, so one row is enough; a test compares the
    sum with a count of the full step.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        sizes = tuple(parameter.shape for parameter in model.parameters())
        relations = getattr(model, "relations", False)
        shape = (type(model), relations, model.config.to_json_string(), sizes, *how_computed(model))
        self.per_row = TRAINING_FLOPS.setdefault(shape, {})

    def of_row(self, length: int) -> int:
        if length not in self.per_row:
            with FlopCounterMode(display=False) as counter:
                ids = torch.zeros((1, length), dtype=torch.long, device=self.model.device)
                output = self.model(ids, use_cache=False)
                # A student that matches states has more outputs, each with a gradient.
                more = (getattr(output, name, None) for name in ("projected", "relations"))
                sum([output.logits.sum(), *(t.sum() for t in more if t is not None)]).backward()
            self.model.zero_grad(set_to_none=True)
            self.per_row[length] = counter.get_total_flops()
        return self.per_row[length]

    def of_batch(self, lengths: np.ndarray) -> int:
        """FLOPs for a batch of rows padded to the longest."""
        return len(lengths) * self.of_row(int(lengths.max()))


def how_computed(model: nn.Module) -> tuple[str, bool]:
    """What changes the FLOPs of a step beside the shapes: fused attention computes its scores
    again in the backward pass, and gradient checkpointing all of the forward pass."""
    again = any(getattr(part, "gradient_checkpointing", False) for part in model.modules())
    return getattr(model.config, "_attn_implementation", None) or "", again


# FLOPs per row of a forward pass, by the model's config, tokens, cached tokens and how many of the
# last tokens get logits (0: all)
FORWARD_FLOPS: dict[str, dict[tuple[int, int, int], float]] = {}


class CountedForward:
    """A model whose forward passes are counted, with or without a KV cache.

    Each input shape is counted once, by torch, in the first pass that has it; models with the same
    config share the counts.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.per_row = FORWARD_FLOPS.setdefault(model.config.to_json_string(), {})
        self.flops = 0.0

    @property
    def device(self) -> torch.device:
        return self.model.device

    def __call__(self, input_ids: torch.Tensor, **options: Any) -> Any:
        rows, length = input_ids.shape
        shape = (length, cached_length(options), options.get("logits_to_keep", 0))
        if shape not in self.per_row:
            with FlopCounterMode(display=False) as counter:
                result = self.model(input_ids, **options)
            self.per_row[shape] = counter.get_total_flops() / rows
        else:
            result = self.model(input_ids, **options)
        self.flops += self.per_row[shape] * rows
        return result

    def charge(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """function(*arguments), such as what is computed from the model's states."""
        with FlopCounterMode(display=False) as counter:
            result = function(*arguments)
        self.flops += counter.get_total_flops()
        return result


def cached_length(options: dict[str, Any]) -> int:
    """How many tokens the cache of a forward pass holds; a recurrent state has no length, and its
    passes cost the same however many tokens it has read."""
    cache = next((options[n] for n in CACHES if options.get(n) is not None), None)
    layers = [] if cache is None else cache.layers
    if not any(isinstance(layer, CacheLayerMixin) for layer in layers):
        return 0
    return cache.get_seq_length()


class Elapsed(Shape):
    """What an interrupted part of a stage has cost."""

    seconds: float
    joules: float


class Stopwatch:
    """The cost of one stage, plus `seconds` and `joules` of an earlier, interrupted part.

    share: of the machine, where other stages run beside this one. It is charged that share of the
    machine's price, and of the energy that a meter of the whole processor shows.
    """

    def __init__(
        self,
        cost: Cost,
        threads: int,
        share: float = 1.0,
        before: dict[str, Any] | None = None,
    ) -> None:
        self.cost, self.threads, self.share = cost, threads, share
        self.before = before or {"seconds": 0.0, "joules": 0.0}
        self.started, self.energy = time.perf_counter(), read_energy()

    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    def read(self, flops: float) -> dict[str, Any]:
        elapsed = self.elapsed()
        joules, source = self.joules(elapsed)
        seconds = self.before["seconds"] + elapsed
        return {
            "flops": float(flops),
            "seconds": round(seconds, 3),
            "joules": round(self.before["joules"] + joules, 1),
            "joules_source": source,
            "money": self.share * seconds / 3600 * self.cost.price_per_hour,
            "currency": self.cost.currency,
            "peak_memory_mb": round(peak_memory() / 2**20),
        }

    def joules(self, elapsed: float) -> tuple[float, str]:
        after = read_energy()
        if self.energy is not None and after is not None and after >= self.energy:
            return self.share * (after - self.energy), "measured, by share of threads"
        watts = self.cost.watts_per_thread * self.threads
        return watts * elapsed, f"estimate: {self.cost.watts_per_thread:g} W per thread"


def cpu_seconds() -> tuple[float, float]:
    """Seconds of processor time so far: of all processes, and of this one with its workers (those
    that have ended)."""
    times, own = psutil.cpu_times(), psutil.Process().cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    guests = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # in user, too
    ours = own.user + own.system + own.children_user + own.children_system
    return sum(times) - idle - guests, ours


def load_of_others(before: tuple[float, float], workers: int = 1) -> float | None:
    """The share of the processor time spent since then that other programs took. None where the
    system does not tell what workers used."""
    if workers > 1 and sys.platform != "linux":
        return None
    total, own = (now - then for now, then in zip(cpu_seconds(), before, strict=True))
    return max(0.0, 1 - own / max(total, 1e-9))


def read_energy() -> float | None:
    """Joules since an arbitrary start, by the NVML counter of a GPU or the RAPL one of a CPU."""
    if torch.cuda.is_available():
        try:
            import pynvml

            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
            return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
        except Exception:
            return None
    try:
        return int(RAPL.read_text()) / 1e6
    except (OSError, ValueError):
        return None


def peak_memory() -> int:
    """Peak memory of this process so far, in bytes; on a CPU this includes pages of memory-mapped
    files, which the system can reclaim."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
