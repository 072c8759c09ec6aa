"""The one training loop."""

import dataclasses
import json
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from configs.schema import LabError, Training
from experiment import training_state
from experiment.checkpoints import load_checkpoint, save_checkpoint
from experiment.cost import TrainingFlops
from experiment.experiment import loss_of, open_experiment
from experiment.reading import read_config
from experiment.run import Run
from models.language import build_model, initialise, load_model, parameter_count
from models.rows import batch_order, collate
from student.hidden import WithProjections
from student.recipe import FROM_TEXT, objective_of
from tasks.pronounce import split_of
from teacher.outputs import make_outputs
from teacher.source import LocalModel

TINY = Path(__file__).parent.parent / "configs" / "tiny.yaml"

TEXT = objective_of(FROM_TEXT)


@pytest.fixture
def lab(tmp_path):
    config = read_config(TINY, ["log_every=1"])
    (tmp_path / "run").mkdir()
    run = Run.open(tmp_path / "run", config, {})
    lab = open_experiment(config, run, train.Accelerator(cpu=True))
    run.manifest["data"] = {"rows": "rows", "tokenizer": "tokenizer"}
    return lab


def fit(lab, objective=None, steps=5, stage="teacher", **changed):
    settings = lab.config.teacher
    model = build_model(settings.model, lab.task)
    training = settings.training.model_copy(update=changed)
    loss = loss_of(lab, FROM_TEXT, training)
    if objective is not None:
        loss = dataclasses.replace(loss, objective=objective)
    closing = train.fit(
        lab, stage, initialise(model, 0), train.teacher_training_set(lab, 0), loss, training,
        steps=steps, seed=0, lineage="",
    )  # fmt: skip
    lab.run.record_stage(stage, *closing)
    return closing


def with_dropout(lab, dropout):
    model = lab.config.teacher.model.model_copy(update={"settings": {"attention_dropout": dropout}})
    teacher = lab.config.teacher.model_copy(update={"model": model})
    return dataclasses.replace(lab, config=lab.config.model_copy(update={"teacher": teacher}))


def losses(lab, stage):
    return [line["loss"] for line in lab.run.metrics() if line["stage"] == stage]


@pytest.mark.parametrize("prompt_weight", [0.0, 0.3])
def test_the_loss_does_not_depend_on_accumulation(lab, prompt_weight):
    """The mean of means of micro-batches would, as rows differ in length."""
    fit(lab, stage="whole", prompt_weight=prompt_weight)
    fit(lab, stage="parts", prompt_weight=prompt_weight, accumulation=5)
    np.testing.assert_allclose(losses(lab, "whole"), losses(lab, "parts"), rtol=1e-5)
    assert len(losses(lab, "whole")) == 5


def test_the_loss_of_matched_states_does_not_depend_on_accumulation(lab, tmp_path):
    """Its denominator is another one: all positions, not those of the answers."""
    recipe = lab.config.recipes["states"]
    fit(lab)
    train.produce_outputs(lab, lab.plan.request(recipe).stage, recipe)
    data = train.training_set_of(lab, recipe, 0, train.CountedForward)
    settings = lab.config.students
    for stage, accumulation in (("whole", 1), ("parts", 5)):
        model = build_model(settings.model, lab.task)
        training = settings.training.model_copy(update={"accumulation": accumulation})
        closing = train.fit(
            lab, stage, WithProjections(initialise(model, 0), data.hidden_width, 0), data,
            loss_of(lab, recipe, training), training, steps=3, seed=0, lineage="",
        )  # fmt: skip
        lab.run.record_stage(stage, *closing)
    np.testing.assert_allclose(losses(lab, "whole"), losses(lab, "parts"), rtol=1e-5)
    saved = load_model(lab.run.folder / "whole")  # without the projections
    assert parameter_count(saved) == parameter_count(model)


def test_the_logged_norm_is_that_of_the_mean_loss(lab):
    """Divided by the tokens once: a second time would be hidden by AdamW, and clip nothing ever."""
    fit(lab, steps=1)
    model = initialise(build_model(lab.config.teacher.model, lab.task), 0)
    batch = collate(lab.rows, batch_order(lab.rows.lengths, 32, 0)(0), 0, 1.0)
    logits = model(batch.input_ids).logits[batch.counted]
    torch.nn.functional.cross_entropy(logits, batch.targets).backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    logged = next(line["grad_norm"] for line in lab.run.metrics())
    assert logged == pytest.approx(norm.item(), rel=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_training_that_was_interrupted_goes_on_with_the_next_batch(dropout, lab, monkeypatch):
    lab = with_dropout(lab, dropout)
    lab = dataclasses.replace(lab, config=lab.config.model_copy(update={"checkpoint_seconds": 0}))
    whole = fit(lab, steps=8, stage="whole")

    def stop(path, step, *rest):
        save(path, step, *rest)
        if step == 5:
            raise KeyboardInterrupt

    save = training_state.checkpoint
    monkeypatch.setattr(training_state, "checkpoint", stop)
    with pytest.raises(KeyboardInterrupt):
        fit(lab, steps=8, stage="parts")
    monkeypatch.setattr(training_state, "checkpoint", save)
    parts = fit(lab, steps=8, stage="parts")
    assert parts[1]["sha256"] == whole[1]["sha256"]
    assert losses(lab, "parts") == losses(lab, "whole")
    assert parts[0]["flops"] == whole[0]["flops"]


def test_checkpoints_are_written_by_step_too(lab, monkeypatch):
    """For those whose clock is no measure, as on a machine that sleeps."""
    config = lab.config.model_copy(update={"checkpoint_seconds": 1e9, "checkpoint_steps": 3})
    saved = []
    save = training_state.checkpoint

    def noted(path, step, *rest):
        saved.append(step)
        save(path, step, *rest)

    monkeypatch.setattr(training_state, "checkpoint", noted)
    fit(dataclasses.replace(lab, config=config), steps=10)
    assert saved == [3, 6, 9]


def test_training_never_sees_the_held_out_words(lab, monkeypatch):
    asked = []
    rows = type(lab.task).rows
    monkeypatch.setattr(
        type(lab.task), "rows", lambda self, split: asked.append(split) or rows(self, split)
    )
    opened = open_experiment(lab.config, lab.run, lab.accelerator)
    assert asked == ["train", "validation"]
    splits = {split_of(lab.task.by_id[int(i)]) for i in opened.validation.ids}
    assert splits == {"validation"}
    assert {split_of(lab.task.by_id[int(i)]) for i in opened.rows.ids} == {"train"}


def test_the_validation_loss_is_that_of_the_answer_tokens_whatever_was_trained(lab):
    """exp of a training loss with a divergence or a prompt in it would be no perplexity."""
    fit(lab, steps=3, prompt_weight=1.0)
    model = load_model(lab.run.teacher)
    batch = collate(lab.validation, np.arange(len(lab.validation)), 0)
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(
            model(batch.input_ids).logits[batch.counted], batch.targets
        )
    *_, logged = (line["validation_nll"] for line in lab.run.metrics())
    assert logged == pytest.approx(expected.item(), rel=1e-5)


def test_a_loaded_teacher_is_not_in_training_mode_and_keeps_no_gradients(lab):
    fit(lab, steps=1)
    teacher = load_model(lab.run.teacher)
    assert not teacher.training
    seen = []

    def watched(*arguments, **options):
        seen.append(teacher(*arguments, **options))
        return seen[-1]

    request = dataclasses.replace(
        lab.plan.request(lab.config.recipes["distilled"]), transfer_rows=20
    )
    binding = request.binding("teacher", "tokenizer", lab.rows, 0)
    folder = lab.run.folder / request.stage
    source = LocalModel(watched, lab.task, request.layers)
    make_outputs(folder, source, lab.rows, request, binding)
    assert seen
    assert not any(output.logits.requires_grad for output in seen)


def test_the_first_loss_is_the_mean_per_counted_token(lab):
    """Once divided by the number of tokens: not twice, not by rows, not by padded positions."""
    fit(lab, steps=1, prompt_weight=0.0)
    model = initialise(build_model(lab.config.teacher.model, lab.task), 0)
    order = batch_order(lab.rows.lengths, 32, 0)
    batch = collate(lab.rows, order(0), 0)
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(
            model(batch.input_ids).logits[batch.counted], batch.targets
        )
    assert losses(lab, "teacher")[0] == pytest.approx(expected.item(), rel=1e-5)


def test_dropout_is_a_function_of_seed_and_step_alone(lab):
    """No checkpoint holds a generator, and none is needed."""
    dropping = with_dropout(lab, 0.3)
    fit(dropping, stage="first")
    torch.rand(7)
    fit(dropping, stage="second")
    fit(lab, stage="without")
    assert losses(lab, "first") == losses(lab, "second")
    assert losses(lab, "first")[1:] != losses(lab, "without")[1:]


@pytest.mark.parametrize("what", ["the loss", "the norm of the gradient"])
def test_what_is_no_number_stops_the_run_before_it_spoils_the_weights(what, lab):
    """One line, the ids of the rows at fault on disk, the checkpoint before it kept."""
    lab = dataclasses.replace(lab, config=lab.config.model_copy(update={"checkpoint_seconds": 0}))
    calls = []

    def spoiled(logits, signal, progress=0.0):
        calls.append(logits)
        losses = TEXT(logits, signal)
        if what == "the loss":
            return losses * (float("nan") if len(calls) > 3 else 1.0)
        if len(calls) > 3:
            losses.register_hook(lambda gradient: gradient * float("nan"))
        return losses

    with pytest.raises(LabError, match=f"teacher: {what} is nan at step 4; its rows are listed"):
        fit(lab, objective=spoiled)
    folder = lab.run.checkpoints("teacher")
    found = json.loads((folder / "nonfinite.json").read_text("utf-8"))
    order = batch_order(lab.rows.lengths, 32, 0)
    assert found["step"] == 4
    assert found["rows"] == lab.rows.ids[order(3)].tolist()
    tensors, meta = load_checkpoint(folder)
    assert meta["step"] == 3
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())


def test_flops_are_those_that_torch_counts_over_the_whole_step(lab):
    from torch.utils.flop_counter import FlopCounterMode

    closing, _ = fit(lab, steps=3)
    model = build_model(lab.config.teacher.model, lab.task)
    order = batch_order(lab.rows.lengths, 32, 0)
    with FlopCounterMode(display=False) as counter:
        for step in range(3):
            ids = collate(lab.rows, order(step), 0).input_ids
            model(ids, use_cache=False).logits.sum().backward()
    assert closing["flops"] == counter.get_total_flops()
    # and are not what 6ND says: toy models are mostly attention and vocabulary
    assert TrainingFlops(model).of_row(16) == pytest.approx(
        6 * 16 * parameter_count(model), rel=0.3
    )


def test_warm_up_then_cosine():
    training = Training(learning_rate=1.0, warmup_fraction=0.1, final_fraction=0.1)
    rates = [train.learning_rate(training, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.55, abs=0.01)
    assert rates[99] == pytest.approx(0.1, abs=0.01)
    assert sorted(rates[10:], reverse=True) == rates[10:]


def test_a_torn_checkpoint_is_passed_over_and_said(tmp_path, capsys):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, {"w": torch.full((3,), float(step))}, {"flops": step})
    files = sorted(tmp_path.glob("step-*"))
    assert len(files) == 2
    files[-1].write_bytes(files[-1].read_bytes()[:-4])
    tensors, meta = load_checkpoint(tmp_path)
    assert meta == {"step": 2, "flops": 2}
    assert tensors["w"].tolist() == [2.0] * 3
    assert "is damaged" in capsys.readouterr().out


def test_the_log_of_a_killed_stage_loses_its_torn_line_and_what_the_checkpoint_lacks(lab):
    for step in (1, 2, 3):
        lab.run.log("teacher", step=step)
    with open(lab.run.checkpoints("teacher") / "metrics.jsonl", "a") as file:
        file.write('{"stage": "teacher", "st')
    lab.run.forget_metrics("teacher", after=2)
    assert [line["step"] for line in lab.run.metrics(lab.run.checkpoints("teacher"))] == [1, 2]
    assert json.loads((lab.run.folder / "ledger.json").read_text()) == []


# Steps that free 8 MB and take as much again; prints how many pages the system had to find.
STEPS = """
import resource
import numpy
from experiment.workers import keep_freed_memory

def steps(count):
    for _ in range(count):
        taken = [numpy.ones(2**17) for _ in range(8)]
        del taken

keep_freed_memory()
steps(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
steps(20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="no other library can be told")
def test_what_a_step_frees_is_there_for_the_next():
    command = [sys.executable, "-c", STEPS]
    done = subprocess.run(command, cwd=TINY.parent.parent, capture_output=True, check=True)
    assert int(done.stdout) < 100  # of 40,960
