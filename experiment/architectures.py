"""Which architectures of transformers pass the probe: the table in docs/architectures.md.

    python -m experiment.architectures            # about a minute

Each is built small, in a process of its own: one that takes too much memory or time ends alone.
"""

import multiprocessing
import sys
import warnings
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import transformers

from configs.files import write_atomically
from configs.schema import LabError, Model, TaskConfig
from models.language import build_model, initialise, sha256_of_tensors
from models.probe import PROBES, problem
from tasks import load_task
from tasks.task import Task

TABLE = Path(__file__).parent.parent / "docs" / "architectures.md"
COLUMNS = {  # what `yes` means
    "build": "transformers builds it in the small size that is asked for",
    "seed": "two models from one seed have the same weights",
    "tokenizer": "it has an embedding for every token, and its saved tokenizer is the same",
    "logits": "it gives finite logits for every token of the vocabulary",
    "learnable": "it excludes no token by a logit of minus infinity",
    "causal": "a later token does not change the logits of an earlier one (encoders: as decoders)",
    "cache": "generating with its cache gives the logits of the whole text",
    "head": "where a vocabulary is large, its logits can be computed in parts",
    "gradients": "every weight receives a gradient",
    "positions": "it can read the longest row",
    "sizes": "no part of it is far larger than was asked for",
    "FLOPs": "torch counts its matrix products",
}
SECONDS, BYTES = 60, 8 * 2**30  # of one architecture, at most
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
ARCHITECTURES = (
    "apertus", "arcee", "bart", "bert", "biogpt", "bitnet", "bloom", "cohere", "cohere2",
    "deepseek_v3", "dots1", "ernie4_5", "exaone4", "falcon", "falcon_mamba", "gemma", "gemma2",
    "gemma3_text", "glm4", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_oss", "gptj",
    "granite", "helium", "llama", "mamba", "mamba2", "mistral", "mixtral", "mpt", "nemotron",
    "olmo2", "olmoe", "opt", "phi3", "qwen2", "qwen3", "qwen3_moe", "roberta", "smollm3",
    "stablelm", "starcoder2",
)  # fmt: skip


def main() -> int:
    rows = {name: in_its_own_process(name) for name in ARCHITECTURES}
    write_atomically(TABLE, page(rows))
    passing = sum(not any(row.values()) for row in rows.values())
    print(f"{passing} of {len(rows)} architectures pass; {TABLE}")
    return 0


def in_its_own_process(architecture: str) -> dict[str, str | None]:
    """{probe: what is wrong, or None} of one architecture."""
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(architecture, there))
    process.start()
    there.close()
    try:
        found = here.recv() if here.poll(SECONDS) else {"build": f"takes over {SECONDS} s"}
    except EOFError:
        found = {"build": f"ended by the system, perhaps for more than {BYTES / 2**30:.0f} GiB"}
    process.kill()
    process.join()
    return found


def child(architecture: str, answer: Connection) -> None:
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    answer.send(probed(architecture, load_task(TaskConfig(limit=100))))


def probed(architecture: str, task: Task) -> dict[str, str | None]:
    """Every probe of one small model of this architecture."""
    settings = Model(architecture=architecture, initializer_range=0.1, **SHAPE)
    try:
        model = initialise(build_model(settings, task), 0)
        torch.rand(5)
        again = initialise(build_model(settings, task), 0)
    except LabError as error:
        return {"build": str(error)}
    same = len({sha256_of_tensors(each.state_dict()) for each in (model, again)}) == 1
    found = {"build": None, "seed": None if same else "two builds from one seed differ"}
    model.eval()
    return found | {name: problem(name, model, task) for name in PROBES}


def page(rows: dict[str, dict[str, str | None]]) -> str:
    """The page as Markdown."""
    columns = ["build", "seed", *PROBES]
    meanings = [f"- **{column}**: {COLUMNS[column]}" for column in columns]
    lines = [
        "# Architectures",
        "",
        "Which architectures of transformers can be a teacher or a student here: each was built",
        f"small, for the task `{TaskConfig().name}`, and probed as every model is before it is",
        "trained (see `models/probe.py`). What fails is refused with the reason below.",
        "",
        f"Written by `python -m experiment.architectures` with transformers "
        f"{transformers.__version__}. What `yes` means:",
        "",
        *meanings,
        "",
        f"| architecture | {' | '.join(columns)} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name, row in rows.items():
        marks = ("-" if c not in row else "no" if row[c] else "yes" for c in columns)
        lines.append(f"| {name} | {' | '.join(marks)} |")
    refused = {name: next(filter(None, row.values()), None) for name, row in rows.items()}
    lines += ["", "Refused:", ""]
    lines += [f"- {name}: {reason}" for name, reason in refused.items() if reason]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
