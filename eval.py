"""Evaluate a finished run: how closely do the students match the teacher, and at what cost?

    python eval.py runs/quickstart                              # eval.json, report.html, a table
    python eval.py runs/quickstart --ask deepseek distillation  # what each model answers
    python eval.py runs/quickstart --check                      # reproduced? exit code 0, 1 or 2
    python eval.py runs/quickstart --selfcheck                  # silent errors? exit code 0 or 1
    python eval.py runs/api --radioactivity                     # do students carry the watermark?
    python eval.py runs/api --provenance --candidates runs/b    # who taught the students?
    python eval.py --compare runs/a runs/b                      # what differs, and why
    python eval.py --environment                                # what a bug report needs
    python eval.py runs/quickstart --update                     # write results/quickstart.json

Never trains. Make choices with --split validation; the held-out split is for the final evaluation.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from configs.command import run_command
from experiment.command import before_imports, command_line, eval_parser

if __name__ == "__main__":
    before_imports(eval_parser())

import numpy as np
import torch

from configs.files import say, write_atomically, write_sealed
from configs.schema import Config, LabError
from experiment.bought import evaluated_rows
from experiment.check import artifacts_of, check_run, compare_runs, losses_of
from experiment.cost import CountedForward, Stopwatch
from experiment.environment import print_environment
from experiment.evidence import provenance, radioactivity, studies_of_defence
from experiment.experiment import (
    open_experiment,
    open_model,
    open_task,
    open_teacher,
    require_same_rows,
    teacher_task,
)
from experiment.leaks import leaks
from experiment.plan import TEACHERS, Plan
from experiment.push import push
from experiment.reference import committed_differences, write_reference
from experiment.result import (
    costs,
    decide,
    divergences,
    entry,
    environments,
    gaps,
    map_of_traces,
    measure_speed,
    reasoning_of,
    studies_of_cost,
    teacher_references,
    writes_reasoning,
)
from experiment.run import SCHEMA, Run
from experiment.selfcheck import selfcheck_run
from experiment.tries import tuned_for
from experiment.workers import keep_freed_memory
from measure.evaluate import Evaluation, TeacherReference, free_running
from measure.laws import scaling_laws
from measure.report.answers import EXAMPLES, examples, shown_rows
from measure.report.console import print_answers, print_result
from measure.report.page import render_report
from measure.report.story import models_side_by_side
from models.rows import Rows
from tasks.task import Task
from teacher.source import prompts_for

RESULTS = Path(__file__).parent / "results"
SPEED_SAMPLE = 512  # rows


def main(arguments: list[str] | None = None) -> int:
    parser = eval_parser()
    options = parser.parse_intermixed_args(arguments)
    if options.ask and not options.run and Path(options.ask[-1]).is_dir():
        options.run = Path(options.ask.pop())  # --ask deepseek runs/quickstart
    if not (options.run or options.compare or options.environment):
        parser.error(
            f"name a finished run, for example: {command_line('eval.py', 'runs/quickstart')}"
        )
    return run_command(lambda: story(options), "rerun the same command to evaluate again")


def story(options: argparse.Namespace) -> int:
    """Do what the options ask for; returns the exit code."""
    if options.environment:
        return print_environment()
    if options.compare:
        say("\n".join(compare_runs(*map(Run.finished, options.compare))))
        return 0
    if options.student and not options.push:
        raise LabError("--student says which one is uploaded; add --push OWNER/NAME")
    if options.update and options.split != "heldout":
        raise LabError("results/ holds held-out figures; remove --split with --update")
    run = Run.finished(options.run)
    config = run.config()
    torch.set_num_threads(run.manifest["environment"]["threads"])
    keep_freed_memory()
    if options.ask is not None:
        ask(run, config, options.ask)
    elif options.check is not None:
        name = options.check or config.name
        return check_run(run, config, name, RESULTS, lambda: judge(run, config, "heldout"))
    elif options.push:
        return push(run, options.student, options.push)
    elif options.radioactivity:
        owners, key = options.candidates, options.key
        database, tokens = options.database, options.tokens
        return radioactivity(run, owners, key, database, tokens, options.text)
    elif options.leaks:
        database = options.database or run.folder / "api.sqlite"
        return leaks(run, options.candidates, database, options.key)
    elif options.provenance:
        return provenance(run, options.candidates, options.controls, options.reach)
    elif options.selfcheck:
        experiment = open_experiment(config, run)
        require_same_rows(run, {s: experiment.task.rows(s) for s in ("train", "validation")})
        return selfcheck_run(experiment)
    else:
        judge(run, config, options.split)
        if options.update:
            write_reference(run, config, options.bands, RESULTS)
    return 0


def judge(run: Run, config: Config, split: str) -> None:
    """Evaluate every model, compare with the teacher, charge the cost, decide, report."""
    with run.locked():
        watch = Stopwatch(config.cost, torch.get_num_threads())
        plan, task = Plan(config), open_task(run, config)
        splits = [split] if split == "validation" else list(task.evaluation_splits)
        if split != "validation":  # counted first: an interrupted evaluation has read it too
            count_read(run)
        require_same_rows(run, {name: task.rows(name) for name in splits})
        rows = {name: evaluated_rows(config, task, name) for name in splits}
        references, evaluations, measured, flops = evaluate_models(run, plan, task, rows)
        estimates = {
            name: {
                split: references[split].metrics(seeds, is_one_model=name in TEACHERS)
                for split, seeds in by_split.items()
            }
            for name, by_split in evaluations.items()
        }
        entries = {
            name: entry(run, plan, task, name, estimates[name], measured[name])
            for name in evaluations
        }
        result = {
            "schema": SCHEMA,
            "config": config.model_dump(mode="json"),
            "split": split,
            "seeds": config.seeds,
            "heldout_reads": run.manifest.get("heldout_reads", 0),
            "overlap": run.manifest.get("overlap"),
            "teacher": entries["teacher"],
            "students": {name: entries[name] for name in config.recipes},
            "controls": {n: entries[n] for n in plan.evaluated if n not in config.recipes},
            "cost": costs(run, plan, task, {"stage": "evaluation", **watch.read(flops)}),
            "gaps": gaps(config, task, estimates, splits[0]),
            "tuned": config.tuned and tuned_for(config),
            "verdicts": decide(
                config, task, estimates, splits, committed_differences(config, RESULTS)
            ),
            "environment": environments(run),
            "artifacts": artifacts_of(run),
            "rows": {name: split_rows.digest() for name, split_rows in rows.items()},
        }
        result |= {
            "laws": scaling_laws(result, divergences(estimates, splits[0])),
            "map": map_of_traces(config, task, estimates),
            **studies_of_cost(result, task, estimates, splits[0]),
            **studies_of_defence(result, run, references[splits[0]]),
        }
        publish(result, run, task, references[splits[0]], evaluations, splits[0])


def count_read(run: Run) -> None:
    """Count how often the held-out split was read."""
    run.manifest["heldout_reads"] = run.manifest.get("heldout_reads", 0) + 1
    run.save()


def evaluate_models(
    run: Run, plan: Plan, task: Task, rows: dict[str, Rows]
) -> tuple[dict[str, TeacherReference], dict[str, dict[str, list[Evaluation]]], dict, float]:
    """({split: the teacher there}, {model: {split: one evaluation per seed}}, other measurements of
    each model, FLOPs)."""
    teacher, references = teacher_references(plan.config, run, task, rows)
    evaluations = {"teacher": {s: [references[s].evaluation] for s in rows}}
    sample = task.evaluation_rows("validation")
    sample = sample.take(np.arange(min(SPEED_SAMPLE, len(sample))))
    measured, flops = {"teacher": {}}, 0.0
    if teacher is not None:
        own_task = references[next(iter(rows))].own_task
        speed = measure_speed(teacher.model, own_task, prompts_for(own_task, task, sample))
        reasons = reasoning_of(teacher, references, evaluations["teacher"], True)
        measured["teacher"], flops = {"speed": speed, **reasons}, teacher.flops
    for name in plan.evaluated:
        stages = [plan.stage(name, seed) for seed in plan.seeds_of(name)]
        models = [CountedForward(open_model(run, stage)) for stage in stages]
        evaluations[name] = {s: [references[s].evaluate(m) for m in models] for s in rows}
        speed = measure_speed(models[0].model, task, sample)
        reasons = reasoning_of(
            models[0], references, evaluations[name], writes_reasoning(plan, name)
        )
        measured[name] = {"speed": speed, **reasons}
        flops += sum(model.flops for model in models)
    return references, evaluations, measured, flops


def publish(
    result: dict[str, Any],
    run: Run,
    task: Task,
    reference: TeacherReference,
    evaluations: dict[str, dict[str, list[Evaluation]]],
    split: str,
) -> None:
    """Write eval.json and the report for the held-out split; print table, verdicts and cost."""
    if result["config"]["precision"] == "float64":
        result["trace"] = {stage: list(steps.values()) for stage, steps in losses_of(run).items()}
    if split != "validation":
        first = {name: by_split[split][0] for name, by_split in evaluations.items()}
        result["examples"] = examples(reference, first, models_side_by_side(result))
        write_sealed(run.folder / "eval.json", result)
        report = render_report(run.metrics(), result, reference, first)
        write_atomically(run.folder / "report.html", report)
    print_result(result)
    if split != "validation":
        say(f"\nreport  {run.folder / 'report.html'}\nfigures {run.folder / 'eval.json'}")
        say(f"next: {command_line('eval.py', run.folder, '--ask', *task.examples)}")


def ask(run: Run, config: Config, questions: list[str]) -> None:
    """Print the answers of teacher, students and `baseline`; by default to held-out questions."""
    plan, task = Plan(config), open_task(run, config)
    own_task = teacher_task(config, run, task)
    names = [*config.recipes, *(c for c in config.controls if c == "baseline")]
    if not config.sold_elsewhere:
        names.insert(0, "teacher")
    models = {name: open_model(run, plan.stage(name)) for name in names if name != "teacher"}
    if "teacher" in names:
        models = {"teacher": open_teacher(run, task), **models}
    splits = {s: task.rows(s) for s in ("train", "validation", *task.evaluation_splits)}
    heldout = splits["heldout"]
    shown = shown_rows(task, heldout, EXAMPLES)
    for question in questions or [task.question(heldout, i) for i in shown]:
        answers = {}
        for name, model in models.items():
            asked = own_task if name == "teacher" else task
            rows = Rows.build([0], [asked.prompt(question)], [[]])
            answers[name] = free_running(model, asked, rows)
        print_answers(question, answers, task, splits)
    print("p: the probability that a model gives to its whole answer")


if __name__ == "__main__":
    sys.exit(main())
