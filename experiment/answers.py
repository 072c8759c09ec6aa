"""The teacher's answers to the prompts of the evaluation splits, for a task whose data has none:
what students are compared with there."""

from contextlib import closing
from dataclasses import replace

from experiment.cost import CountedForward
from experiment.experiment import (
    Experiment,
    adopt_answers,
    binding_of,
    request_of_answers,
    source_of,
    splits_to_answer,
)
from experiment.log import OutputsLog
from experiment.stages import record_stage
from student.recipe import ANSWERS
from teacher.outputs import finish_outputs, make_outputs, sha256_of_outputs


def answer_prompts(experiment: Experiment) -> Experiment:
    """Let the teacher answer them, at temperature 1; they are charged to nobody. Returns the
    experiment with what it wrote."""
    run, task = experiment.run, experiment.task
    for split in splits_to_answer(task):
        request, rows = request_of_answers(split), task.rows(split)
        if run.stage_done(request.stage):
            continue
        binding = binding_of(experiment, ANSWERS, request, rows)
        source = source_of(experiment, ANSWERS, request, CountedForward)
        accelerator, result = experiment.accelerator, None
        with closing(source), OutputsLog(experiment, request.stage, len(rows), source) as log:
            make_outputs(
                run.folder / request.stage, source, rows, request, binding, log.progress,
                accelerator.process_index, accelerator.num_processes,
            )  # fmt: skip
        accelerator.wait_for_everyone()
        if experiment.is_main:
            made = finish_outputs(run.folder / request.stage, len(rows))
            names = {"sha256": sha256_of_outputs(run.folder / request.stage), "rows": len(rows)}
            result = log.watch.read(made.flops), names
            print(f"{request.stage:<34} {len(rows)} rows, for the evaluation")
        record_stage(experiment, request.stage, result)
    adopt_answers(run, task)
    return replace(experiment, validation=task.evaluation_rows("validation"))
