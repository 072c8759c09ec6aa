"""The one training loop."""

import dataclasses
import json

import numpy as np
import pytest
import torch

import train
from configs.schema import LabError, Recipe, Training
from experiment import training_state
from experiment.checkpoints import load_checkpoint
from experiment.collecting import sources
from experiment.command import command_line
from experiment.experiment import loss_of, open_experiment
from models.language import build_model, initialise, load_model, parameter_count
from models.rows import batch_order, collate
from student.hidden import WithProjections
from student.recipe import FROM_TEXT, objective_of
from tasks.pronounce import split_of
from teacher.outputs import make_outputs
from teacher.source import LocalModel
from tests.helpers import PART, fit, train_tiny

TEXT = objective_of(FROM_TEXT)


def with_dropout(lab, dropout):
    model = lab.config.teacher.model.model_copy(update={"settings": {"attention_dropout": dropout}})
    teacher = lab.config.teacher.model_copy(update={"model": model})
    return dataclasses.replace(lab, config=lab.config.model_copy(update={"teacher": teacher}))


def losses(lab, stage):
    return [line["loss"] for line in lab.run.metrics() if line["stage"] == stage]


@pytest.mark.parametrize("prompt_weight", [0.0, 0.3])
def test_the_loss_does_not_depend_on_accumulation(lab, prompt_weight):
    """A mean of micro-batch means would, because rows differ in length."""
    fit(lab, stage="whole", prompt_weight=prompt_weight)
    fit(lab, stage="parts", prompt_weight=prompt_weight, accumulation=5)
    np.testing.assert_allclose(losses(lab, "whole"), losses(lab, "parts"), rtol=1e-5)
    assert len(losses(lab, "whole")) == 5


def test_the_loss_of_matched_states_does_not_depend_on_accumulation(lab, tmp_path):
    """Its denominator is different: all positions, not only those of the answers."""
    recipe = lab.config.recipes["states"]
    fit(lab)
    with sources(lab) as open_source:
        train.produce_outputs(lab, lab.plan.request(recipe).stage, recipe, open_source)
    data = train.training_set_of(lab, recipe, 0, train.CountedForward)
    settings = lab.config.students
    for stage, accumulation in (("whole", 1), ("parts", 5)):
        model = build_model(settings.model, lab.task)
        training = settings.training.model_copy(update={"accumulation": accumulation})
        result = train.fit(
            lab, stage, WithProjections(initialise(model, 0), data.hidden_width, 0), data,
            loss_of(lab, recipe, training), training, steps=3, seed=0, lineage="",
        )  # fmt: skip
        lab.run.record_stage(stage, *result)
    np.testing.assert_allclose(losses(lab, "whole"), losses(lab, "parts"), rtol=1e-5)
    saved = load_model(lab.run.folder / "whole")  # without the projections
    assert parameter_count(saved) == parameter_count(model)


def test_a_float64_trace_holds_more_than_float32(lab):
    """Its losses are compared to 1e-9."""
    config = lab.config.model_copy(update={"precision": "float64"})
    lab = dataclasses.replace(lab, config=config)
    data, training = train.teacher_training_set(lab, 0), lab.config.teacher.training
    model = initialise(build_model(lab.config.teacher.model, lab.task), 0).double()
    loss = loss_of(lab, FROM_TEXT, training)
    result = train.fit(lab, "teacher", model, data, loss, training, steps=3, seed=0, lineage="")
    lab.run.record_stage("teacher", *result)
    found = losses(lab, "teacher")
    assert len(found) == 3
    assert all(loss != float(np.float32(loss)) for loss in found)


def test_the_logged_norm_is_that_of_the_mean_loss(lab):
    """Divided by the tokens once: AdamW would hide a second time, but clipping would stop."""
    fit(lab, steps=1)
    model = initialise(build_model(lab.config.teacher.model, lab.task), 0)
    batch = collate(lab.rows, batch_order(lab.rows.lengths, 32, 0)(0), 0, 1.0)
    logits = model(batch.input_ids).logits[batch.counted]
    torch.nn.functional.cross_entropy(logits, batch.targets).backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    logged = next(line["grad_norm"] for line in lab.run.metrics())
    assert logged == pytest.approx(norm.item(), rel=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_an_interrupted_training_resumes_with_the_next_batch(dropout, lab, monkeypatch):
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


def test_dropout_depends_on_seed_and_step_only(lab):
    """Checkpoints hold no generator state, and need none."""
    dropping = with_dropout(lab, 0.3)
    fit(dropping, stage="first")
    torch.rand(7)
    fit(dropping, stage="second")
    fit(lab, stage="without")
    assert losses(lab, "first") == losses(lab, "second")
    assert losses(lab, "first")[1:] != losses(lab, "without")[1:]


@pytest.mark.parametrize("what", ["the loss", "the norm of the gradient"])
def test_a_nonfinite_loss_or_gradient_stops_the_run_before_it_spoils_the_weights(what, lab):
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


def test_a_student_that_writes_its_own_text_trains_until_its_flops_are_spent(lab, monkeypatch):
    """However many steps were expected: their cost is known only afterwards."""
    fit(lab, steps=1)
    own = Recipe(access="logits", sequences="student", objective="reverse_kl")
    for max_flops, steps in ((1.0, 1), (None, 3)):
        monkeypatch.setattr(train, "steps_within_budget", lambda *_, most=max_flops: (3, most))
        cost, _ = train.train_student(lab, f"students/own/seed-{steps}", "own", own, 0)
        assert cost["steps"] == steps


def test_warm_up_then_cosine():
    training = Training(learning_rate=1.0, warmup_fraction=0.1, final_fraction=0.1)
    rates = [train.learning_rate(training, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.55, abs=0.01)
    assert rates[99] == pytest.approx(0.1, abs=0.01)
    assert sorted(rates[10:], reverse=True) == rates[10:]


def test_a_learning_rate_that_is_far_too_high_ends_in_one_line(tmp_path, capsys):
    assert train_tiny(tmp_path, *PART, "teacher.training.learning_rate=1e30") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: teacher: ")
    assert "lower learning_rate" in error
    assert json.loads((tmp_path / "tiny/checkpoints/teacher/nonfinite.json").read_text())["rows"]


def test_the_training_ends_with_where_things_are_and_the_next_command(tmp_path, capsys):
    few = ("seeds=[0]", "controls=[baseline]", "verdicts=[]", "teacher.epochs=1")
    assert train_tiny(tmp_path, *few, "recipes={plain: {access: logits}}") == 0
    printed = capsys.readouterr().out
    assert f"cost       {tmp_path / 'tiny'}" in printed
    assert f"next: {command_line('eval.py', tmp_path / 'tiny')}" in printed
