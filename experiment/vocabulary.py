"""List the tokens that a pretrained teacher uses when it answers a task's prompts.

    python -m experiment.vocabulary configs/stories.yaml --rows 300 --out configs/stories.tokens

Most of a large vocabulary is of no use to a small student that learns one kind of text. The file
goes into `task.vocabulary` of the config.
"""

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from configs.command import run_command
from configs.files import say, write_atomically
from configs.schema import Config, LabError
from experiment.cost import CountedForward
from experiment.experiment import Experiment, new_model, open_experiment
from experiment.reading import read_config
from experiment.run import Run
from models.generate import answers_of

SHOWN = (1024, 2048, 4096, 8192, 16384)  # sizes whose coverage is printed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiment.vocabulary",
        description="List the tokens that a pretrained teacher uses when it answers a task's "
        "prompts, the most frequent first.",
    )
    parser.add_argument("config", type=Path, help="of a task with prompts that a teacher answers")
    parser.add_argument("--rows", type=int, default=300, help="prompts that it answers")
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    options = parser.parse_args(arguments)
    return run_command(
        lambda: list_tokens(options.config, options.rows, options.out), "nothing was written"
    )


def list_tokens(path: Path, rows: int, out: Path) -> int:
    config = read_config(path, ["task.vocabulary=null"], without=("tuned",))
    if not (config.teacher.model and config.teacher.model.pretrained):
        raise LabError(f"{path}: teacher.model.pretrained is missing; only such a teacher is asked")
    with tempfile.TemporaryDirectory() as folder:
        experiment = open_experiment(config, Run(folder))
        counts = tokens_written(experiment, config, rows)
    tokenizer = experiment.task.tokenizer
    order = sorted(counts, key=lambda token: (-counts[token], token))
    shares = np.cumsum([counts[token] for token in order]) / sum(counts.values())
    for size in (size for size in SHOWN if size < len(order)):
        say(f"{size:>6,} tokens are {100 * shares[size - 1]:.1f} % of what it wrote")
    tokens = tokenizer.convert_ids_to_tokens(order)
    write_atomically(out, "".join(f"{token}\n" for token in tokens))
    say(f"{len(order):>6,} tokens, all of {sum(counts.values()):,} that it wrote, are in {out}")
    return 0


def tokens_written(experiment: Experiment, config: Config, rows: int) -> Counter[int]:
    """How often each token occurs in prompts and in answers at temperature 1."""
    task, prompts = experiment.task, experiment.prompts
    chosen = prompts.take(np.arange(min(rows, len(prompts))))
    model = new_model(experiment, config.teacher.model, 0).eval()
    model = model.to("cuda") if torch.cuda.is_available() else model
    counts: Counter[int] = Counter(prompts.tokens[prompts.in_prompt()].tolist())
    for _, answer in answers_of(
        CountedForward(model),
        chosen,
        32,
        longest=task.longest_answer,
        end=task.end,
        temperature=1.0,
        generator=torch.Generator().manual_seed(0),
        vocabulary=task.vocabulary,
    ):
        counts.update(answer.tokens.tolist())
    return counts


if __name__ == "__main__":
    sys.exit(main())
