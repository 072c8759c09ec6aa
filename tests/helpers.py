"""What several test files use."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from hypothesis import strategies as st

import train
from configs.files import read_sealed, sha256_of_json, write_sealed
from experiment.experiment import loss_of
from experiment.run import read_lines, write_lines
from measure.metrics import metrics_of
from measure.statistics import Estimate
from measure.verdicts import Comparison, verdicts
from models.language import build_model, initialise
from student.objectives import OBJECTIVES
from student.recipe import FROM_TEXT
from tasks.pronounce import Pronounce
from tasks.reason import Reason

ROOT = Path(__file__).parent.parent
TINY = str(ROOT / "configs" / "tiny.yaml")
# Of runs; those of studies that count have other shapes.
STUDIES = {"extraction", "provenance"}
RESULTS = [f for f in sorted((ROOT / "results").glob("*.json")) if f.stem not in STUDIES]
DIVERGENCES = [name for name, term in OBJECTIVES.items() if term.compares_distributions]


def task_with(tokenizer, longest_row):
    """What building a model needs of a task."""
    return SimpleNamespace(
        name="test",
        tokenizer=tokenizer,
        vocabulary=len(tokenizer),
        longest_row=longest_row,
        pad=tokenizer.pad_token_id,
    )


def train_tiny(runs: Path, *overrides: str) -> int:
    return train.main([TINY, *overrides, "--runs", str(runs)])


def without_times(result: dict) -> dict:
    """eval.json without values that depend on a clock or on the machine's load."""
    timed = {"seconds", "joules", "money", "peak_memory_mb", "latency_ms", "answers_per_second"}
    timed |= {"environment", "heldout_reads", "load_of_others"}
    timed |= {"seal"}  # a hash of all of it

    def strip(value):
        if isinstance(value, dict):
            return {k: strip(v) for k, v in value.items() if k not in timed}
        return [strip(v) for v in value] if isinstance(value, list) else value

    return strip(result)


@contextmanager
def edited(file: Path) -> Iterator[dict]:
    """The content of a sealed file, to be changed as if the run had written it so."""
    content = read_sealed(file)
    yield content
    write_sealed(file, content)


def edit_log(run: Path, change: Callable[[list[dict]], None]) -> None:
    """Change metrics.jsonl as if the run had written it so."""
    lines = read_lines(run)
    change(lines)
    write_lines(run, lines)
    with edited(run / "manifest.json") as manifest:
        for stage, made in manifest["stages"].items():
            made["log"] = sha256_of_json([line for line in lines if line["stage"] == stage])


def tensor_hashes(run: Path) -> dict[str, str]:
    stages = json.loads((run / "manifest.json").read_text())["stages"]
    return {stage: entry.get("sha256") for stage, entry in stages.items()}


# A part of configs/tiny.yaml, whose stages must give the same results as there.
PART = ("seeds=[0]", "controls=[baseline,shuffled]")


# Overrides of configs/tiny.yaml: every way of composing a method.
MODEL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


RECIPES = {
    "plain": {"access": "logits"},
    "warm": {"access": "logits", "temperature": 2},
    "hot": {"access": "logits", "temperature": 4},
    "top_5": {"access": "top_k", "outputs": {"k": 5}},
    "sampled_6": {"access": "sampled", "outputs": {"k": 6}},
    "own": {"access": "logits", "sequences": "student", "objective": "reverse_kl"},
    "mixed": {
        "access": "top_k",
        "outputs": {"k": 5},
        "student": {"on_policy": {"start": 0, "end": 1}},
    },
    "assistant": {
        "access": "logits",
        "student": {"model": MODEL | {"hidden_size": 24}, "budget_fraction": 0.5},
    },
    "assisted": {"access": "sampled", "outputs": {"k": 6}, "teachers": ["assistant"]},
    "averaged": {"access": "logits", "teachers": ["teacher", "second_teacher"]},
    "related": {
        "access": "hidden",
        "outputs": {"layers": [1]},
        "sequences": "teacher",
        "objective": {"forward_kl": 0.7, "hidden_mse": 0.1, "value_relation_kl": 0.2},
    },
    "born_again": {"access": "logits", "student": {"model": MODEL, "initial_layers": [1]}},
}


METHODS = (
    "name=methods", "seeds=[0]", "controls=[baseline,second_teacher]", "verdicts=[]",
    "teacher.epochs=3",
    f"recipes={json.dumps(RECIPES)}", "compare={against: [baseline, plain]}",
)  # fmt: skip


KNOWN = metrics_of(Pronounce) | metrics_of(Reason)


def coin(generator, seeds, rows, chance, spread=0.0):
    chances = chance + spread * generator.standard_normal((seeds, 1))
    hits = generator.random((seeds, rows)) < chances
    return Estimate.of(np.stack([hits, np.ones_like(hits)], axis=-1).astype(float))


def drawn(generator, seeds, rows, level, between=0.0, common=0.0, row=None):
    """A model of which rows and seeds vary as in real runs: by 0.3 per row, of which the variance
    `common` is shared by all seeds, and by `between` per seed; one seed has no luck of its own.
    row: what models that are compared share of each row."""
    shared = math.sqrt(common) * 0.3 * generator.standard_normal((1, rows))
    noise = math.sqrt(1 - common) * 0.3 * generator.standard_normal((seeds, rows))
    luck = between * generator.standard_normal((seeds, 1)) if seeds > 1 else 0.0
    values = level + luck + shared + noise + (0.0 if row is None else row)
    return Estimate(values.mean(axis=1), (values - values.mean(axis=1, keepdims=True)) / rows)


def compared(claim, metric, threshold, first, second):
    return Comparison(claim, metric, KNOWN[metric].sign, threshold, first, second)


@st.composite
def estimates(draw, seeds=None):
    """Right answers of some seeds over 12 rows; in real runs as here, some rows may have none."""
    seeds = seeds or draw(st.integers(1, 4))
    rows = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), min_size=12, max_size=12)
    columns = draw(st.lists(rows, min_size=seeds, max_size=seeds))
    return Estimate.of(np.array(columns, dtype=float))


def verdict(*comparison):
    return verdicts([compared(*comparison)])[0]


def fit(lab, objective=None, steps=5, stage="teacher", **changed):
    settings = lab.config.teacher
    model = build_model(settings.model, lab.task)
    training = settings.training.model_copy(update=changed)
    loss = loss_of(lab, FROM_TEXT, training)
    if objective is not None:
        loss = dataclasses.replace(loss, objective=objective)
    result = train.fit(
        lab, stage, initialise(model, 0), train.teacher_training_set(lab, 0), loss, training,
        steps=steps, seed=0, lineage="",
    )  # fmt: skip
    lab.run.record_stage(stage, *result)
    return result
