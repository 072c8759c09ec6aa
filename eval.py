"""Judge a finished run: how closely do the students match the teacher, and at what cost?

    python eval.py runs/quickstart                              # eval.json, report.html, a table
    python eval.py runs/quickstart --ask deepseek distillation  # what each model answers
    python eval.py runs/quickstart --update                     # and write results/quickstart.json

Never trains. Choices are made with --split validation; the held-out split is for the end.
"""

import argparse
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from configs.runs import Run, sha256_of_model, write_atomically, write_json
from configs.schema import Config, LabError
from measure.answers import Answers, completion_logits, fidelity_columns, free_running
from measure.cost import CountedForward, Stopwatch
from measure.provenance import environment
from measure.readme import with_tables
from measure.report import SHOWN_WORDS, render_report
from measure.statistics import (
    Metric,
    expected_calibration_error,
    share_of_gap,
    verdict,
    verdict_line,
)
from student.recipe import recipes_of
from tasks import load_task
from tasks.pronounce import Pronounce
from tasks.rows import Rows
from teacher.model import load_model
from teacher.outputs import name_of

SCHEMA = 1
RESULTS = Path(__file__).parent / "results"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a finished run folder, as runs/quickstart")
    parser.add_argument("--ask", nargs="+", metavar="WORD", help="print every model's answer")
    parser.add_argument("--split", default="heldout", choices=["heldout", "validation"])
    parser.add_argument("--update", action="store_true", help="also write results/<name>.json")
    options = parser.parse_args(arguments)
    try:
        run = Run.finished(options.run)
        config = run.config()
        torch.set_num_threads(run.manifest["environment"]["threads"])
        if options.ask:
            ask(run, config, options.ask)
            return 0
        with run.locked():
            judge(run, config, options.split, options.update)
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command starts the evaluation again", file=sys.stderr)
        return 130
    return 0


@dataclass
class Judged:
    """One model on one split: what it said, and per-row columns of every metric."""

    answers: Answers
    columns: dict[str, np.ndarray]  # [rows] or [rows, C]


def judge(run: Run, config: Config, split: str, update: bool) -> None:
    """The whole judging story: ask every model, compare with the teacher, charge, decide, tell."""
    watch = Stopwatch(config.cost, torch.get_num_threads())
    task = load_task(config.task)
    splits = [split] if split == "validation" else list(task.judged)
    rows = {name: task.rows(name) for name in splits}
    arms = arms_of(config)

    teacher = CountedForward(open_model(run, "teacher"))
    teachers = {name: Reference(teacher, task, rows[name]) for name in splits}
    judged: dict[str, dict[str, list[Judged]]] = {"teacher": {}, **{arm: {} for arm in arms}}
    speed = {"teacher": measure_speed(teacher.model, task, rows[splits[0]])}
    flops = 0.0
    for name in splits:
        judged["teacher"][name] = [teachers[name].judged]
    for arm, seeds in arms.items():
        for seed in seeds:
            model = CountedForward(open_model(run, stage_of(arm, seed)))
            for name in splits:
                judged[arm].setdefault(name, []).append(teachers[name].judge(model, task))
            if arm not in speed:
                speed[arm] = measure_speed(model.model, task, rows[splits[0]])
            flops += model.flops
    metrics = {
        arm: {name: metrics_of(judged[arm][name], judged["teacher"][name][0]) for name in splits}
        for arm in judged
    }

    evaluation = {"stage": "evaluation", **watch.read(flops + teacher.flops)}
    result = {
        "schema": SCHEMA,
        "config": config.model_dump(mode="json"),
        "split": split,
        "seeds": config.seeds,
        "teacher": entry(run, config, "teacher", [], metrics, speed, splits),
        "students": {
            arm: entry(run, config, arm, arms[arm], metrics, speed, splits)
            for arm in config.recipes
        },
        "controls": {
            arm: entry(run, config, arm, arms[arm], metrics, speed, splits)
            for arm in arms
            if arm not in config.recipes
        },
        "cost": costs(run, config, evaluation),
        "gaps": gaps(config, metrics, splits[0]),
        "verdicts": [
            verdict(
                v.claim,
                v.metric,
                v.threshold,
                *(
                    metrics[arm][v.split if len(splits) > 1 else split][v.metric]
                    for arm in v.claim.split(" beats ")
                ),
            )
            for v in config.verdicts
        ],
        "environment": environment(torch.get_num_threads())
        | {"trained": run.manifest["environment"]},
    }
    if split == "heldout":
        run.manifest["heldout_reads"] = run.manifest.get("heldout_reads", 0) + 1
        run.save()
        write_json(run.folder / "eval.json", result)
        first = {arm: found[split][0] for arm, found in judged.items()}
        report = render_report(
            run,
            result,
            {arm: one.columns["calibration"].sum(0) for arm, one in first.items()},
            side_by_side(task, rows[split], first),
            dark_knowledge(task, rows[split], teachers[split].logits),
        )
        write_atomically(run.folder / "report.html", report)
        if update:
            write_json(RESULTS / f"{config.name}.json", result)
            readme = RESULTS.parent / "README.md"
            write_atomically(readme, with_tables(readme.read_text(encoding="utf-8"), RESULTS))
    print_result(result, run, split)


class Reference:
    """The teacher on the rows of one split, asked once and compared with every student."""

    def __init__(self, teacher: CountedForward, task: Pronounce, rows: Rows) -> None:
        self.rows = rows
        self.logits, self.targets = completion_logits(teacher, task, rows)
        self.judged = self.judge(teacher, task, self.logits)

    def judge(
        self, model: CountedForward, task: Pronounce, logits: torch.Tensor | None = None
    ) -> Judged:
        answers = free_running(model, task, self.rows)
        if logits is None:
            logits, _ = completion_logits(model, task, self.rows)
        columns = fidelity_columns(self.logits, logits, self.targets, self.rows)
        columns |= task.grade(self.rows.ids, answers.texts)
        return Judged(answers, columns)


def metrics_of(seeds: list[Judged], teacher: Judged) -> dict[str, Metric]:
    """Every metric of one arm on one split; columns are [seeds, rows, C]."""
    one = np.ones(len(teacher.answers.texts))
    same = [
        np.array(
            [a == b for a, b in zip(s.answers.texts, teacher.answers.texts, strict=True)], float
        )
        for s in seeds
    ]
    teacher_wrong = teacher.columns["wrong"]

    def fraction(top: list[np.ndarray], bottom: list[np.ndarray]) -> Metric:
        pairs = zip(top, bottom, strict=True)
        return Metric(np.stack([np.stack([t, b], axis=-1) for t, b in pairs]))

    def over(name: str, bottom: str) -> Metric:
        return fraction([s.columns[name] for s in seeds], [s.columns[bottom] for s in seeds])

    return {
        "word_error_rate": fraction([s.columns["wrong"] for s in seeds], [one for _ in seeds]),
        "phoneme_error_rate": over("edits", "length"),
        "kl_teacher_student": over("kl_teacher_student", "positions"),
        "kl_student_teacher": over("kl_student_teacher", "positions"),
        "top1_agreement": over("top1_agreement", "positions"),
        "sequence_agreement": fraction(same, [one for _ in seeds]),
        "agreement_on_teacher_errors": fraction(
            [s * teacher_wrong for s in same], [teacher_wrong for _ in seeds]
        ),
        "nll_gap": over("nll_gap", "positions"),
        "ece": Metric(
            np.stack([s.columns["calibration"] for s in seeds]), expected_calibration_error
        ),
    }


def side_by_side(task: Pronounce, rows: Rows, first: dict[str, Judged]) -> list[dict[str, Any]]:
    """Every row's word, what each arm (its first seed) answers, and what the dictionary lists."""
    return [
        {
            "word": task.question(rows, i),
            "listed": task.words[task.question(rows, i)],
            "right": not first["teacher"].columns["wrong"][i],
            **{arm: one.answers.texts[i] for arm, one in first.items()},
        }
        for i in np.argsort(rows.ids)
    ]


def dark_knowledge(task: Pronounce, rows: Rows, logits: torch.Tensor) -> list[dict[str, Any]]:
    """The words that the teacher is least sure of, with its likeliest tokens at each position."""
    log_probs = torch.log_softmax(logits, dim=-1)
    by_row = log_probs.split((rows.lengths - rows.prompt_lengths).tolist())
    entropy = [float(-(p.exp() * p).sum(-1).mean()) for p in by_row]
    shown = []
    for i in np.argsort(entropy)[::-1][:SHOWN_WORDS]:
        top = by_row[i].exp().topk(5, dim=-1)
        positions = [
            {
                "target": task.tokens[target],
                "top": [(task.tokens[t], p) for t, p in zip(ids, chances, strict=True)],
            }
            for target, ids, chances in zip(
                rows.completion(i), top.indices.tolist(), top.values.tolist(), strict=True
            )
        ]
        shown.append({"word": task.question(rows, i), "positions": positions})
    return shown


QUALITY = ("word_error_rate", "phoneme_error_rate")


def entry(
    run: Run,
    config: Config,
    arm: str,
    seeds: list[int],
    metrics: dict[str, dict[str, dict[str, Metric]]],
    speed: dict[str, dict],
    splits: list[str],
) -> dict[str, Any]:
    """What eval.json says of the teacher, a student or a control."""
    stages = [stage_of(arm, seed) for seed in seeds or [0]]
    by_split = {
        split: {
            "quality": {k: m.summary() for k, m in metrics[arm][split].items() if k in QUALITY},
            "fidelity": {
                k: m.summary() for k, m in metrics[arm][split].items() if k not in QUALITY
            },
        }
        for split in splits
    }
    recipe = recipes_of(config).get(arm)
    ledger = [run.cost_of(stage) for stage in stages]
    first = by_split.pop(splits[0])
    if arm == "teacher":
        first["fidelity"] = {"ece": first["fidelity"]["ece"]}
        for other in by_split.values():
            other.pop("fidelity")
    return {
        "params": run.manifest["stages"][stages[0]]["params"],
        "sha256": [run.manifest["stages"][stage]["sha256"] for stage in stages],
        "steps": [row["steps"] for row in ledger],
        "recipe": recipe.model_dump(mode="json") if recipe else None,
        **first,
        **by_split,
        "cost": {
            "flops": statistics.mean(row["flops"] for row in ledger),
            "seconds": statistics.mean(row["seconds"] for row in ledger),
            **speed[arm],
        },
    }


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
            "and its stage, or train again under another name=..."
        )
    return model


def measure_speed(model: torch.nn.Module, task: Pronounce, rows: Rows) -> dict[str, float]:
    """Latency of one greedy answer (median of 20), and answers per second in batches."""
    sample = rows.take(np.arange(min(512, len(rows))))
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
    fractions = {}
    for arm, recipe in config.recipes.items():
        parts = [run.cost_of(stage_of(arm, config.seeds[0]))]
        if recipe.access != "none":
            parts.append(run.cost_of(f"outputs/{name_of(recipe)}"))
        fractions[arm] = {
            key: sum(part[key] for part in parts) / teacher[key] if teacher[key] else None
            for key in ("flops", "seconds", "joules")
        }
    main = next(iter(fractions))
    amortised = {
        str(count): (
            teacher["flops"]
            + run.cost_of_outputs()
            + count * run.cost_of(stage_of(main, config.seeds[0]))["flops"]
        )
        / (count * teacher["flops"])
        for count in (1, 10, 100)
    }
    return {
        "stages": [*run.ledger, evaluation],
        "fraction_of_teacher": fractions[main],
        "fraction_of_teacher_by_student": fractions,
        "flops_per_student_with_teacher": amortised,
        "joules_source": teacher["joules_source"],
    }


def gaps(config: Config, metrics: dict, split: str) -> dict[str, Any]:
    """How much of the way from a control to the teacher in word errors each student went."""
    result: dict[str, Any] = {}
    for arm in config.recipes:
        for control in ("scarce", "alone"):
            if control in config.controls:
                errors = [
                    metrics[who][split]["word_error_rate"] for who in (control, arm, "teacher")
                ]
                result.setdefault(arm, {})[f"{control}_to_teacher"] = share_of_gap(*errors)
    return result


def print_result(result: dict[str, Any], run: Run, split: str) -> None:
    """The table, the verdicts and the cost, in fixed-width ASCII."""
    table = Table(box=box.ASCII, title=f"{result['config']['name']}, {split} words")
    columns = [
        ("word errors %", "quality", "word_error_rate", 100),
        ("phoneme errors %", "quality", "phoneme_error_rate", 100),
        ("same answer %", "fidelity", "sequence_agreement", 100),
        ("copied errors %", "fidelity", "agreement_on_teacher_errors", 100),
        ("KL(t,s) nats", "fidelity", "kl_teacher_student", 1),
        ("ECE %", "fidelity", "ece", 100),
    ]
    for heading in ("", "params", "TFLOPs", *(c[0] for c in columns)):
        table.add_column(heading, justify="left" if not heading else "right")
    entries = {"teacher": result["teacher"], **result["students"], **result["controls"]}
    for arm, found in entries.items():
        cells = []
        for _, group, key, scale in columns:
            metric = found[group].get(key)
            digits = 1 if scale == 100 else 3
            cells.append(
                "-"
                if metric is None
                else f"{scale * metric['mean']:.{digits}f} "
                f"[{scale * metric['ci95'][0]:.{digits}f}, {scale * metric['ci95'][1]:.{digits}f}]"
            )
        table.add_row(arm, f"{found['params']:,}", f"{found['cost']['flops'] / 1e12:.2f}", *cells)
    console = Console(width=160)
    console.print(table)
    for line in result["verdicts"]:
        print(verdict_line(line))
    for arm, shares in result["gaps"].items():
        for gap, share in shares.items():
            if share["share"] is None:
                print(f"{arm}: no gap {gap.replace('_', ' ')} in word errors to close")
                continue
            low, high = share["ci95"]
            print(
                f"{arm} closes {100 * share['share']:.0f} % [{100 * low:.0f}, {100 * high:.0f}] of "
                f"the gap {gap.replace('_', ' ')} in word errors"
            )
    for arm, fraction in result["cost"]["fraction_of_teacher_by_student"].items():
        print(
            f"outputs + {arm} = {100 * fraction['flops']:.1f} % of the teacher's training FLOPs, "
            f"{100 * fraction['seconds']:.1f} % of its seconds"
        )
    if split == "heldout":
        print(f"\nreport  {run.folder / 'report.html'}\nfigures {run.folder / 'eval.json'}")
        print(f"next: python eval.py {run.folder} --ask deepseek distillation")


def ask(run: Run, config: Config, words: list[str]) -> None:
    """What teacher, student and `alone` answer, with the probability they give the answer."""
    task = load_task(config.task)
    arms = ["teacher", *config.recipes, *(c for c in config.controls if c == "alone")]
    models = {arm: open_model(run, stage_of(arm, config.seeds[0])) for arm in arms}
    for word in words:
        prompt = task.prompt(word.lower())
        rows = Rows.build([0], [prompt], [[]])
        print(word)
        for arm, model in models.items():
            said = free_running(model, task, rows)
            print(f"  {arm:<12} {said.texts[0]:<40} p = {np.exp(said.log_probs[0]):.3f}")
        listed = task.words.get(word.lower())
        print(f"  {'dictionary':<12} {' | '.join(listed) if listed else '(not listed)'}")


if __name__ == "__main__":
    sys.exit(main())
