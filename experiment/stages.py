"""Stages: run them in this process or in workers, and record what they cost and made."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from configs.files import say
from configs.schema import Config, LabError
from experiment.experiment import Experiment, open_experiment, verify_stage
from experiment.processes import new_accelerator
from experiment.run import Run
from experiment.workers import side_by_side
from models.language import (
    model_card,
    parameter_count,
    save_model,
    sha256_of_files,
    sha256_of_model,
)
from models.pretrained import tokenizer_of
from tasks.task import Task

# What a finished stage returns: its cost for the ledger, its artifact for the manifest. None in
# processes that do not write.
StageResult = tuple[dict[str, Any], dict[str, Any]] | None


def run_stages(experiment: Experiment, jobs: dict[str, tuple]) -> None:
    """Run the stages that are not done yet: {stage: (function, *arguments)}.

    With `workers` above 1 that many processes share the threads. The result of a stage does not
    depend on when it runs, nor on what runs beside it.
    """
    run, config, started = experiment.run, experiment.config, time.monotonic()
    waiting = {stage: job for stage, job in jobs.items() if not run.stage_done(stage)}
    results = ((s, function(experiment, s, *rest)) for s, (function, *rest) in waiting.items())
    if config.workers > 1 and len(jobs) > 1:
        work_of = {s: (work, function, s, *rest) for s, (function, *rest) in waiting.items()}
        results = side_by_side(work_of, config.workers, open_worker, (config, run.folder))
    for done, (stage, result) in enumerate(results, start=1):
        record_stage(experiment, stage, result)
        if experiment.is_main and done < len(waiting):
            left = (time.monotonic() - started) / done * (len(waiting) - done)
            say(f"{stage} is done, {done} of {len(waiting)}; {duration(left)} left")


def duration(seconds: float) -> str:
    """About how long something takes, for people."""
    if seconds < 90:
        return f"about {seconds:.0f} s"
    if seconds < 5400:
        return f"about {seconds / 60:.0f} minutes"
    return f"about {seconds / 3600:.1f} h"


def record_stage(experiment: Experiment, stage: str, result: StageResult) -> None:
    """The main process records the stage; the others reload the manifest."""
    if experiment.is_main:
        experiment.run.record_stage(stage, *result)
    experiment.accelerator.wait_for_everyone()
    if not experiment.is_main:
        experiment.run.reload()


def reuse_stage(experiment: Experiment, stage: str, made_from: str) -> bool:
    """Copy a finished stage that a sibling run made from the same inputs; whether it is done."""
    run = experiment.run
    if run.stage_done(stage):
        return True
    if experiment.is_main:
        found = run.find_stage(stage, made_from)
        other = next((sibling for sibling in found if is_intact(sibling, stage)), None)
        if other is not None:
            run.copy_stage(stage, other)
            say(f"{stage}: copied from {other.folder}, which made it from the same inputs")
    experiment.accelerator.wait_for_everyone()
    if not experiment.is_main:
        run.reload()
    return run.stage_done(stage)


def is_intact(run: Run, stage: str) -> bool:
    """Whether a stage is what its run made, log included; prints what is not."""
    try:
        verify_stage(run, stage)
        run.metrics()
    except LabError as error:
        say(f"{stage}: not copied from another run: {error}")
        return False
    return True


def register_pretrained(experiment: Experiment, stage: str, model: nn.Module) -> StageResult:
    """Register a pretrained teacher unchanged, at no cost here; what its training has cost others
    stands beside it, as published."""
    watch = experiment.stopwatch()
    folder, settings = experiment.run.folder / stage, experiment.config.teacher.model
    if experiment.is_main:
        card = model_card(stage, model, f"`{settings.pretrained}`, unchanged.", 0)
        save_model(model, tokenizer_of(settings), folder, card)
    experiment.accelerator.wait_for_everyone()
    published = experiment.config.teacher.published
    cost = {**watch.read(0), "steps": 0}
    if published:
        cost["published"] = {"flops": published.flops, "source": published.source}
    return cost, made_of(folder, model)


def usage_of(task: Task) -> str:
    """For the model card: how to ask a language model of this task, and its data's licence."""
    licence = f"\nTrained on {task.data_licence}.\n" if task.data_licence else ""
    if task.tokenizer is None:
        return licence
    question = task.examples[0]
    prompt = task.prompt(question)
    tokens = task.tokenizer.convert_ids_to_tokens(prompt)
    shown = "tokenizer.decode(answer[0, len(ids):], skip_special_tokens=True)"
    if task.tokenizer.decode(prompt) != task.render(prompt):  # it would glue the words together
        shown = (
            '" ".join(tokenizer.convert_ids_to_tokens(answer[0, len(ids):], '
            "skip_special_tokens=True))"
        )
    return f"""{licence}
To ask it `{question}`, in its folder:

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".")
ids = tokenizer.convert_tokens_to_ids({tokens})
answer = model.generate(torch.tensor([ids]), max_new_tokens={task.longest_answer}, do_sample=False)
print({shown})
```
"""


def made_of(folder: Path, model: nn.Module) -> dict[str, Any]:
    """The manifest entry of a saved model."""
    return {
        "sha256": sha256_of_model(folder),
        "files": sha256_of_files(folder),
        "params": parameter_count(model),
    }


def open_worker(config: Config, folder: Path) -> None:
    """A worker opens the experiment once, for all the stages it runs."""
    global worker_experiment
    accelerator = new_accelerator(config, folder)
    if config.trackers:
        accelerator.init_trackers(config.name)
    worker_experiment = replace(
        open_experiment(config, Run(folder).reload(), accelerator), share=1 / config.workers
    )


def work(function: Callable[..., StageResult], stage: str, *arguments: Any) -> StageResult:
    """One stage, in a worker."""
    worker_experiment.run.reload()
    return function(worker_experiment, stage, *arguments)
