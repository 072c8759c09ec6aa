"""What one GPU makes of a step: model FLOPs utilisation, tokens per second and memory for a teacher
of 135 million parameters and a student of 33 million in bfloat16, at 49,152 outcomes; from stored
outputs, and with a live teacher. Then whether two runs are equal to the bit with deterministic
kernels, and whether a killed run resumes to the same weights. About 8 minutes.

    make gpu
    python -m tests.benchmarks.gpu --small     # the same on a CPU with tiny models, in a minute

The weights are random, which changes no cost. Exit code 1 if the utilisation is below LEAST, or if
runs differ.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

import train
from configs.schema import Model
from experiment.run import Run
from models.language import build_language_model, initialise, save_model
from tasks.text import train_tokenizer

LEAST = 0.45  # of the measured peak, for stored outputs
ROOT = Path(__file__).parent.parent.parent
START = "import sys, torch; torch.use_deterministic_algorithms(True); import train; "
DETERMINISTIC = [sys.executable, "-c", START + "sys.exit(train.main(sys.argv[1:]))"]


@dataclass(frozen=True)
class Size:
    vocabulary: int
    row_tokens: int
    documents: int
    teacher: dict[str, Any]
    student: dict[str, Any]
    batch_rows: int
    tflops: float  # outputs and one student
    short: float  # the same, of the runs that are compared


LARGE = Size(
    49_152, 512, 4_000,
    {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
     "intermediate_size": 1536, "settings": {"num_key_value_heads": 3}},
    {"hidden_size": 384, "num_hidden_layers": 8, "num_attention_heads": 6},
    64, 12_000.0, 1_500.0,
)  # fmt: skip
SMALL = Size(
    9_000, 48, 300,
    {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    8, 0.05, 0.03,
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="tiny models, on any machine")
    small = parser.parse_args().small
    if not small and not torch.cuda.is_available():
        print("no GPU here; --small runs the same on a CPU", file=sys.stderr)
        return 2
    size, device = (SMALL if small else LARGE), "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    peak = peak_flops(device)
    print(f"{name}: {peak / 1e12:.1f} TFLOP/s in products of bfloat16 matrices")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_inputs(folder, size)
        shares = speeds(folder, size, peak)
        same = equal_runs(folder, size)
        resumed = resumes(folder, size, same)
    good = same is not None and resumed and (small or shares["stored"] >= LEAST)
    return 0 if good else 1


def peak_flops(device: str) -> float:
    """The best of some square products, in FLOP/s."""
    width = 8192 if device == "cuda" else 512
    a, b = (torch.randn(width, width, dtype=torch.bfloat16, device=device) for _ in range(2))
    best = 0.0
    for _ in range(8):
        wait(device)
        started = time.perf_counter()
        for _ in range(10):
            a @ b
        wait(device)
        best = max(best, 10 * 2 * width**3 / (time.perf_counter() - started))
    return best


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def make_inputs(folder: Path, size: Size) -> None:
    """A teacher with random weights and a tokenizer with as many tokens as wanted, and documents of
    random words."""
    draw = np.random.Generator(np.random.PCG64(0))
    words = ["".join(draw.choice([*"abcdefghij"], 5)) for _ in range(500)]
    texts = [" ".join(draw.choice(words, 2 * size.row_tokens)) for _ in range(size.documents)]
    content = json.loads(train_tokenizer(texts[:50], 512).backend_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    for number in range(len(vocabulary), size.vocabulary):
        vocabulary[f"unused{number}"] = number
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        bos_token="<s>", eos_token="</s>", pad_token="<pad>",
    )  # fmt: skip
    model = build_language_model(Model(**size.teacher), tokenizer, size.row_tokens)
    save_model(initialise(model, 0), tokenizer, folder / "teacher", "random weights")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "texts.jsonl").write_text(lines, encoding="utf-8")


def write_config(folder: Path, name: str, size: Size, tflops: float, recipes: list[str]) -> Path:
    every = {
        "stored": {"access": "top_k", "outputs": {"k": 20}},
        "live": {"access": "logits", "sequences": "student"},
    }
    config = {
        "name": name,
        "task": {
            "name": "text", "path": str(folder / "texts.jsonl"),
            "tokenizer": str(folder / "teacher"), "row_tokens": size.row_tokens,
        },
        "seeds": [0],
        "teacher": {
            "model": {
                "pretrained": str(folder / "teacher"), "dtype": "bfloat16", "attention": "sdpa",
            },
            "published": {
                "source": "random weights", "parameters": 1, "tokens": 1,
                "allows_distillation": "yes",
            },
        },
        "students": {
            "model": {**size.student, "attention": "sdpa"},
            "training": {
                "batch_rows": size.batch_rows, "learning_rate": 0.0003, "autocast": "bfloat16",
            },
            "tflops": tflops,
        },
        "recipes": {recipe: every[recipe] for recipe in recipes},
        "controls": [],
        "checkpoint_steps": 20,
        "checkpoint_seconds": 600,
        "log_every": 10,
    }  # fmt: skip
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return file


def speeds(folder: Path, size: Size, peak: float) -> dict[str, float]:
    """{recipe: its share of the peak}, printed with tokens per second and memory."""
    config = write_config(folder, "speed", size, size.tflops, ["stored", "live"])
    assert train.main([str(config), "--runs", str(folder / "runs")]) == 0
    run = Run.finished(folder / "runs" / "speed")
    shares = {}
    for name in ("stored", "live"):
        row = run.cost_of(f"students/{name}/seed-0")
        lines = [line for line in run.metrics() if line["stage"] == row["stage"]]
        tokens = statistics.median(line["tokens_per_s"] for line in lines[1:])
        shares[name] = row["flops"] / row["seconds"] / peak
        print(
            f"{name:<8} {100 * shares[name]:.1f} % of the peak, {tokens:,.0f} tokens/s, "
            f"{row['peak_memory_mb'] / 1024:.1f} GiB at most"
        )
    made = run.cost_of(next(stage for stage in run.manifest["stages"] if "outputs/" in stage))
    print(f"outputs  {100 * made['flops'] / made['seconds'] / peak:.1f} % of the peak")
    return shares


def started(config: Path, folder: Path) -> subprocess.Popen:
    settings = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*DETERMINISTIC, str(config), "--runs", str(folder)], env=settings, cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip


def weights(folder: Path) -> str:
    return Run.finished(folder).manifest["stages"]["students/stored/seed-0"]["sha256"]


def equal_runs(folder: Path, size: Size) -> str | None:
    """The hash of the student's weights, if it is the same in two runs."""
    config = write_config(folder, "short", size, size.short, ["stored"])
    found = []
    for number in range(2):
        assert started(config, folder / f"equal-{number}").wait() == 0
        found.append(weights(folder / f"equal-{number}" / "short"))
    same = found[0] == found[1]
    print(f"two runs with deterministic kernels: {'equal to the bit' if same else 'DIFFERENT'}")
    return found[0] if same else None


def resumes(folder: Path, size: Size, expected: str | None) -> bool:
    """Whether a run that is killed after its first checkpoint ends with the same weights."""
    config, place = folder / "short.yaml", folder / "killed"
    process = started(config, place)
    while process.poll() is None and not [*place.glob("short/checkpoints/*/step-*")]:
        time.sleep(0.05)
    killed = process.poll() is None
    if killed:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert started(config, place).wait() == 0
    same = weights(place / "short") == expected
    how = "killed after a checkpoint and resumed" if killed else "done before it could be killed"
    print(f"{how}: {'the same weights' if same else 'OTHER WEIGHTS'}")
    return same and killed


if __name__ == "__main__":
    sys.exit(main())
