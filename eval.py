"""Judge a finished run: how closely do the students match the teacher, and at what cost?

    python eval.py runs/quickstart                              # eval.json, report.html, a table
    python eval.py runs/quickstart --ask deepseek distillation  # what each model answers
    python eval.py runs/quickstart --check                      # does it hold? exit code 0 or 1
    python eval.py runs/quickstart --selfcheck                  # is the run sound? exit code 0 or 1
    python eval.py --compare runs/a runs/b                      # what differs, and why
    python eval.py --environment                                # what a bug report needs
    python eval.py runs/quickstart --update                     # write results/quickstart.json

Never trains. Choices are made with --split validation; the held-out split is for the end.
"""

import argparse
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from safetensors import SafetensorError

from configs.reading import check_config
from configs.runs import (
    Run,
    differences,
    read_json,
    sha256_of_model,
    write_atomically,
    write_json,
)
from configs.schema import SPLITS, Config, LabError, Recipe, Verdict, nearest
from measure.check import artifacts_of, bands, check, compare_runs, losses_of
from measure.cost import CountedForward, Stopwatch
from measure.judged import Judged, Reference, free_running
from measure.laws import scaling_laws
from measure.provenance import environment, environment_facts, judging_sha256
from measure.reasoning import pairs_of_traces, reasoning
from measure.report import render_check, render_report
from measure.selfcheck import selfcheck
from measure.statistics import Comparison, Metric, share_of_gap, verdicts
from measure.tables import console_table, facts_of, with_tables
from student.lab import open_lab, teachers_task
from student.recipe import recipes_of
from tasks import load_task
from tasks.reason import Reason
from tasks.rows import Rows
from tasks.task import Task, in_words_of
from teacher.model import load_model
from teacher.outputs import charged_stages, name_of, needs_outputs, sha256_of_outputs
from teacher.shards import Outputs

SCHEMA = 1
RESULTS = Path(__file__).parent / "results"
# Keys of a config that say how a machine runs it, not what is run.
MACHINE = ("name:", "threads:", "workers:", "cost.", "checkpoint_")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, nargs="?", help="a finished run, as runs/quickstart")
    parser.add_argument("--ask", nargs="+", metavar="QUESTION", help="print every model's answer")
    parser.add_argument("--split", default="heldout", choices=["heldout", "validation"])
    parser.add_argument(
        "--check", nargs="?", const="", metavar="NAME", help="compare with results/<name>.json"
    )
    parser.add_argument("--selfcheck", action="store_true", help="check the run by its own files")
    parser.add_argument("--compare", nargs=2, type=Path, metavar="RUN", help="two runs")
    parser.add_argument("--environment", action="store_true", help="is this machine set up?")
    parser.add_argument("--update", action="store_true", help="also write results/<name>.json")
    parser.add_argument(
        "--bands", nargs="+", type=Path, metavar="RUN", default=[], help="with --update: judged "
        "runs of the same config from other seeds, for the band of every metric",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if not (options.run or options.compare or options.environment):
        parser.error("name a finished run, as in: python eval.py runs/quickstart")
    try:
        if options.environment:
            return tell_environment()
        if options.compare:
            print("\n".join(compare_runs(*map(Run.finished, options.compare))))
            return 0
        if options.update and options.split != "heldout":
            raise LabError("results/ holds held-out figures; leave --split away with --update")
        run = Run.finished(options.run)
        config = run.config()
        torch.set_num_threads(run.manifest["environment"]["threads"])
        if options.ask:
            ask(run, config, options.ask)
            return 0
        if options.check is not None:
            return tell_check(run, config, options.check or config.name)
        if options.selfcheck:
            return tell_selfcheck(run, config)
        with run.locked():
            judge(run, config, options.split)
        if options.update:
            update(run, config, options.bands)
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, SafetensorError) as error:
        print(f"error: {error}; nothing is lost, the same command goes on", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command starts the evaluation again", file=sys.stderr)
        return 130
    return 0


def judge(run: Run, config: Config, split: str) -> None:
    """The whole judging story: ask every model, compare with the teacher, charge, decide, tell."""
    watch = Stopwatch(config.cost, torch.get_num_threads())
    task = load_task(config.task)
    own = teachers_task(config, run, task)
    if split == "heldout":  # counted before it is read: a killed evaluation has seen it too
        run.manifest["heldout_reads"] = run.manifest.get("heldout_reads", 0) + 1
        run.save()
    splits = [split] if split == "validation" else list(task.judged)
    arms = arms_of(config)

    teacher = CountedForward(open_model(run, "teacher"))
    references = {name: Reference(teacher, task, task.rows(name), own) for name in splits}
    judged = {"teacher": {name: [references[name].judged] for name in splits}}
    sample = task.rows("validation")
    sample = sample.take(np.arange(min(512, len(sample))))
    speed = {"teacher": measure_speed(teacher.model, own, in_words_of(own, task, sample))}
    thinks = {"teacher": how_it_thinks(teacher, references, judged["teacher"], None)}
    flops = teacher.flops
    for arm, seeds in arms.items():
        models = [CountedForward(open_model(run, stage_of(arm, seed))) for seed in seeds]
        judged[arm] = {name: [references[name].judge(m) for m in models] for name in splits}
        speed[arm] = measure_speed(models[0].model, task, sample)
        recipe = recipes_of(config).get(arm)
        thinks[arm] = how_it_thinks(models[0], references, judged[arm], recipe)
        flops += sum(model.flops for model in models)
    metrics = {
        arm: {name: references[name].metrics(seeds) for name, seeds in by_split.items()}
        for arm, by_split in judged.items()
    }

    entries = {
        arm: entry(run, config, arm, metrics[arm], speed[arm]) | thinks[arm] for arm in metrics
    }
    result = {
        "schema": SCHEMA,
        "config": config.model_dump(mode="json"),
        "split": split,
        "seeds": config.seeds,
        "teacher": entries["teacher"],
        "students": {arm: entries[arm] for arm in config.recipes},
        "controls": {arm: entries[arm] for arm in arms if arm not in config.recipes},
        "cost": costs(run, config, {"stage": "evaluation", **watch.read(flops)}),
        "gaps": gaps(
            config, task.headline, {arm: found[splits[0]] for arm, found in metrics.items()}
        ),
        "verdicts": verdicts(
            [comparison(claim, metrics) for claim in config.claims() if claim.split in splits]
        ),
        "environment": {
            **environment(torch.get_num_threads()),
            "judging": judging_sha256(),
            "trained": run.manifest["environment"],
            "earlier": run.manifest.get("earlier_environments", []),
        },
        "artifacts": artifacts_of(run),
        "rows": {name: references[name].rows.digest() for name in splits},
    }
    result["laws"] = scaling_laws(result)
    if isinstance(task, Reason):
        result["map"] = map_of_traces(config, metrics)
    if config.precision == "float64":
        result["trace"] = {stage: list(steps.values()) for stage, steps in losses_of(run).items()}
    if split == "heldout":
        write_json(run.folder / "eval.json", result)
        first = {arm: found[split][0] for arm, found in judged.items()}
        write_atomically(
            run.folder / "report.html", render_report(run, result, references[split], first)
        )
    tell(result, run, task)


def update(run: Run, config: Config, others: list[Path]) -> None:
    """Write results/<name>.json, with the bands of this run and of others that differ in seeds (run
    folders, or results of them), and the tables of the README."""
    judged = [read_json(run.folder / "eval.json")]
    for folder in others:
        judged.append(read_json(folder / "eval.json" if folder.is_dir() else folder))
        differing = other_configs(
            judged[-1]["config"], config, (*MACHINE, "seeds:", "teacher.seed:")
        )
        if differing:
            raise LabError(f"{folder} is a run of another config: {differing[0]}")
    reference = {**judged[0], "bands": bands(judged)}
    environment_then = judged[0]["environment"]
    if environment_then["dirty"] or environment_then["trained"]["dirty"]:
        print("made with code that is not committed: others cannot get what made this result")
    if reference["bands"] is None:
        print("fewer than 10 seeds: no bands written; name more runs with --bands")
    write_json(RESULTS / f"{config.name}.json", reference)
    readme = RESULTS.parent / "README.md"
    write_atomically(readme, with_tables(readme.read_text(encoding="utf-8"), RESULTS))


def other_configs(stored: dict[str, Any], config: Config, aside: tuple[str, ...]) -> list[str]:
    """Where a stored config differs from this one, leaving the keys `aside`; a key that it is too
    old to have is at its default."""
    there = check_config(stored, "the stored config").model_dump(mode="json")
    found = differences(there, config.model_dump(mode="json"))
    return [line for line in found if not line.startswith(aside)]


def tell_check(run: Run, config: Config, name: str) -> int:
    """Compare with results/<name>.json; 0 if the run holds, 1 if it is different."""
    file = RESULTS / f"{name}.json"
    if not file.exists():
        known = [found.stem for found in RESULTS.glob("*.json")]
        raise LabError(f"no {file} to check against{nearest(name, known)}; there are {known}")
    reference = read_json(file)
    differing = other_configs(reference["config"], config, MACHINE)
    if differing:
        raise LabError(f"{run.folder} is not the config of {file}: {differing[0]}")
    for stage in run.manifest["stages"]:
        if stage.startswith("outputs/"):
            open_outputs(run, stage)
        else:
            open_model(run, stage)
    if not judged_as_it_is(run):
        with run.locked():
            judge(run, config, "heldout")
    result = read_json(run.folder / "eval.json")
    tier, lines = check(result, reference)
    print("\n".join(lines))
    try:
        write_atomically(run.folder / "check.html", render_check(result, reference, lines))
    except OSError as error:  # somebody else's run, which can be read alone
        print(f"check.html is not written: {error}", file=sys.stderr)
    return 1 if tier == "D" else 0


def judged_as_it_is(run: Run) -> bool:
    """Is eval.json that of these very models and outputs, by this very code?"""
    if not (run.folder / "eval.json").exists():
        return False
    result = read_json(run.folder / "eval.json")
    same_code = result.get("environment", {}).get("judging") == judging_sha256()
    return same_code and result.get("artifacts") == artifacts_of(run)


def tell_selfcheck(run: Run, config: Config) -> int:
    """[OK], [FAIL] or [--] for everything that a run can know of itself; 1 if anything fails."""
    result = read_json(run.folder / "eval.json")
    bad, started = 0, time.perf_counter()
    for good, line in selfcheck(open_lab(config, run), result):
        print(f"{'[--]' if good is None else '[OK]' if good else '[FAIL]':<6} {line}", flush=True)
        bad += good is False
    found = f"{bad} of the findings do not hold" if bad else "the run is sound"
    print(f"{found} (looked at in {time.perf_counter() - started:.0f} s)")
    return 1 if bad else 0


def tell_environment() -> int:
    """[OK] or [FAIL] for everything that a bug report needs; 1 if anything fails."""
    facts = environment_facts()
    for good, line in facts:
        print(f"{'[OK]' if good else '[FAIL]':<6} {line}")
    return 0 if all(good for good, _ in facts) else 1


def entry(
    run: Run,
    config: Config,
    arm: str,
    metrics: dict[str, dict[str, dict[str, Metric]]],
    speed: dict[str, float],
) -> dict[str, Any]:
    """What eval.json says of the teacher, a student or a control; `metrics` by split and group."""
    stages = [stage_of(arm, seed) for seed in arms_of(config).get(arm, [0])]
    recipe = recipes_of(config).get(arm)
    ledger = [run.cost_of(stage) for stage in stages]
    summaries = {
        split: {
            group: {name: metric.summary() for name, metric in found.items()}
            for group, found in groups.items()
        }
        for split, groups in metrics.items()
    }
    if arm == "teacher":  # fidelity to itself says nothing; its calibration does
        for groups in summaries.values():
            groups["fidelity"] = {k: m for k, m in groups["fidelity"].items() if k == "ece"}
    if recipe and recipe.traces == "none":  # what it was never taught to write says nothing
        for groups in summaries.values():
            for metrics_of_group in groups.values():
                for name in {*metrics_of_group} - {"accuracy", "answer_agreement"}:
                    if not name.startswith("accuracy_"):
                        del metrics_of_group[name]
    first, *others = summaries
    return {
        "params": run.manifest["stages"][stages[0]]["params"],
        "sha256": [run.manifest["stages"][stage]["sha256"] for stage in stages],
        "steps": [row["steps"] for row in ledger],
        "recipe": recipe.model_dump(mode="json") if recipe else None,
        **summaries[first],
        **{split: summaries[split] for split in others},
        "cost": {
            "flops": statistics.mean(row["flops"] for row in ledger),
            "seconds": statistics.mean(row["seconds"] for row in ledger),
            **speed,
        },
    }


def comparison(claim: Verdict, metrics: dict[str, Any]) -> Comparison:
    """What a claim compares, with the threshold that the config fixed beforehand."""
    first, second = (
        {**metrics[arm][claim.split]["quality"], **metrics[arm][claim.split]["fidelity"]}
        for arm in claim.names
    )
    return Comparison(
        claim.claim, claim.metric, claim.threshold, first[claim.metric], second[claim.metric]
    )


def map_of_traces(config: Config, metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """Of a task that reasons: where traces pay, a verdict for every pair of students and number of
    steps, all corrected together."""
    cells = [
        Verdict(claim=f"{name} beats {other}", metric=f"accuracy_{steps}", split=split)
        for name, other in pairs_of_traces(config.recipes)
        for split, numbers in SPLITS["reason"].items()
        if split in metrics["teacher"]
        for steps in numbers
    ]
    found = verdicts([comparison(cell, metrics) for cell in cells])
    return [
        {**verdict, "split": cell.split, "steps": int(cell.metric[-1])}
        for verdict, cell in zip(found, cells, strict=True)
    ]


def how_it_thinks(
    model: CountedForward,
    references: dict[str, Reference],
    judged: dict[str, list[Judged]],
    recipe: Recipe | None,
) -> dict[str, Any]:
    """Of a task that reasons: test-time scaling of an arm's first seed on every split."""
    if not all(isinstance(reference.task, Reason) for reference in references.values()):
        return {}
    thinks = recipe is None or recipe.traces != "none"  # teachers do
    found = {
        split: reasoning(
            model, reference.task, reference.rows, judged[split][0].answers.texts, thinks, seed=0
        )
        for split, reference in references.items()
    }
    first, *others = found
    return {"reasoning": found[first] | {split: found[split] for split in others}}


def arms_of(config: Config) -> dict[str, list[int]]:
    """Every student and control with its seeds, in the order of the config."""
    arms = {name: config.seeds for name in recipes_of(config)}
    return arms | ({"twin": [0]} if "twin" in config.controls else {})


def stage_of(arm: str, seed: int) -> str:
    return arm if arm in ("teacher", "twin") else f"students/{arm}/seed-{seed}"


def open_model(run: Run, stage: str) -> torch.nn.Module:
    """A model of the run, checked against the hash in the manifest."""
    folder = run.folder / stage
    model = load_model(folder)
    if sha256_of_model(folder) != run.manifest["stages"][stage]["sha256"]:
        raise LabError(
            f"{folder} is not the model that this run trained (sha256 differs); delete that folder "
            "and run train.py on the config again"
        )
    return model.to("cuda") if torch.cuda.is_available() else model


def open_outputs(run: Run, stage: str) -> Outputs:
    """Outputs of the run, whole and checked against the hash in the manifest."""
    outputs = Outputs(run.folder / stage)
    if sha256_of_outputs(run.folder / stage) != run.manifest["stages"][stage]["sha256"]:
        raise LabError(
            f"{run.folder / stage} does not hold the outputs that this run made (sha256 differs); "
            "delete that folder and run train.py on the config again"
        )
    return outputs


def measure_speed(model: torch.nn.Module, task: Task, sample: Rows) -> dict[str, float]:
    """Latency of one greedy answer (median of 20), and answers per second all at once."""
    times = []
    for i in range(20):
        started = time.perf_counter()
        free_running(model, task, sample.take(np.array([i % len(sample)])))
        times.append(time.perf_counter() - started)
    started = time.perf_counter()
    free_running(model, task, sample)
    return {
        "latency_ms": 1000 * statistics.median(times),
        "answers_per_second": len(sample) / (time.perf_counter() - started),
    }


def costs(run: Run, config: Config, evaluation: dict[str, Any]) -> dict[str, Any]:
    """A row per stage, and outputs plus one student as a fraction of the teacher's training."""
    teacher = run.cost_of("teacher")
    fractions, stored = {}, {}
    for arm, recipe in recipes_of(config).items():
        if needs_outputs(recipe):
            stage = f"outputs/{name_of(recipe)}"
            stored[arm] = {
                "rows": run.manifest["stages"][stage]["rows"],
                "different": run.manifest["stages"][stage].get("different"),
                "bytes_per_token": run.cost_of(stage).get("bytes_per_token"),
                "kept": run.cost_of(stage_of(arm, config.seeds[0])).get("rows"),
            }
        own = [run.cost_of(stage_of(arm, seed)) for seed in config.seeds]
        before = [run.cost_of(s) for s in charged_stages(recipe, config, everything=True)]
        trained = teacher["steps"] > 0  # here; else nobody knows what it took
        fractions[arm] = {
            key: (statistics.median(row[key] for row in own) + sum(row[key] for row in before))
            / teacher[key]
            if trained
            else None
            for key in ("flops", "seconds", "joules")
        }
    main = next(iter(fractions))
    once = charged_stages(config.recipes[main], config, everything=True)
    fixed = teacher["flops"] + sum(run.cost_of(stage)["flops"] for stage in once)
    each = run.cost_of(stage_of(main, config.seeds[0]))["flops"]
    amortised = {
        str(count): (fixed + count * each) / (count * teacher["flops"])
        for count in ((1, 10, 100) if teacher["flops"] else ())
    }
    return {
        "stages": [*run.ledger, evaluation],
        "fraction_of_teacher": fractions[main],
        "fraction_of_teacher_by_student": fractions,
        "outputs_by_student": stored,
        "flops_per_student_with_teacher": amortised,
        "joules_source": teacher["joules_source"],
    }


def gaps(config: Config, headline: str, metrics: dict[str, Any]) -> dict[str, Any]:
    """How much of the way from a control to the teacher each student went, in the headline metric
    of the task."""
    levels = {arm: found["quality"][headline] for arm, found in metrics.items()}
    return {
        arm: {
            f"{control}_to_teacher": share_of_gap(
                headline, levels[control], levels[arm], levels["teacher"]
            )
            for control in ("scarce", "alone")
            if control in config.controls
        }
        for arm in config.recipes
    }


def tell(result: dict[str, Any], run: Run, task: Task) -> None:
    """The table, the verdicts and the cost, in fixed-width ASCII."""
    Console(width=150).print(console_table(result))
    print("\n".join(facts_of(result)))
    if result["split"] == "heldout":
        print(f"\nreport  {run.folder / 'report.html'}\nfigures {run.folder / 'eval.json'}")
        print(f"next: python eval.py {run.folder} --ask {shlex.join(task.example)}")


def ask(run: Run, config: Config, questions: list[str]) -> None:
    """What teacher, student and `alone` answer, with the probability they give the answer."""
    task = load_task(config.task)
    own = teachers_task(config, run, task)
    arms = ["teacher", *config.recipes, *(c for c in config.controls if c == "alone")]
    models = {arm: open_model(run, stage_of(arm, config.seeds[0])) for arm in arms}
    for question in questions:
        said = {}
        for arm, model in models.items():
            words = own if arm == "teacher" else task
            rows = Rows.build([0], [words.prompt(question)], [[]])
            said[arm] = free_running(model, words, rows)
        name = max(map(len, (*said, "the truth")))
        text = min(100, max(len(answers.texts[0]) for answers in said.values()))
        print(question)
        for arm, answers in said.items():
            chance = np.exp(answers.log_probs[0])
            print(f"  {arm:<{name}}  {answers.texts[0]:<{text}}  p = {chance:.3f}")
        print(f"  {'the truth':<{name}}  {' | '.join(task.truths(question)) or '(not listed)'}")


if __name__ == "__main__":
    sys.exit(main())
