"""labs/distill.py computes what the project computes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from configs.schema import Model, Recipe
from labs import distill
from models.language import build_model, initialise
from models.rows import collate
from student.loss import Loss
from student.recipe import FROM_TEXT, objective_of
from student.training_set import TrainingSet
from tasks.pronounce import Pronounce
from teacher.signal import Signal


@pytest.fixture(scope="module")
def task():
    return Pronounce(limit=400)


def both(task, recipe, signal, loss):
    """(loss, gradient) of the first step by the project, and by labs/distill.py."""
    rows, shape = (
        task.rows("train"),
        Model(hidden_size=16, num_hidden_layers=1, num_attention_heads=2),
    )
    indices = distill.batch_order(rows.lengths, 64, 0)(0)
    found = []
    for of_the_project in (True, False):
        model = initialise(build_model(shape, task), 0)
        if of_the_project:
            project_loss = Loss(objective_of(recipe), None, task.pad, task.vocabulary, 0.0)
            value = project_loss(
                model, TrainingSet(rows, signal), indices, project_loss.normalizer(rows, indices)
            )
        else:
            batch = collate(rows, indices, 0)
            value = loss(distill.logits_at(model, batch), batch)
        value.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        found += [value.detach(), gradient]
    return found


def test_learning_from_text_has_the_loss_and_gradient_of_the_project(task):
    def signal(batch):
        return Signal(batch.targets)

    loss, gradient, lab_loss, lab_gradient = both(task, FROM_TEXT, signal, distill.hard_loss)
    torch.testing.assert_close(loss, lab_loss)
    torch.testing.assert_close(gradient, lab_gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distillation_has_the_loss_and_gradient_of_the_project(task, temperature):
    def log_probs(batch):
        logits = np.random.default_rng(0).standard_normal((len(batch.targets), task.vocabulary))
        return torch.log_softmax(torch.from_numpy(logits).float(), -1)

    loss, gradient, lab_loss, lab_gradient = both(
        task,
        Recipe(access="logits", temperature=temperature),
        lambda batch: Signal(batch.targets, log_probs(batch)),
        lambda logits, batch: distill.soft_loss(logits, log_probs(batch), temperature),
    )
    torch.testing.assert_close(loss, lab_loss)
    torch.testing.assert_close(gradient, lab_gradient, atol=1e-6, rtol=1e-4)


def test_the_file_is_short_and_imports_only_rows(task):
    lines = Path(distill.__file__).read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    imported = [line for line in lines if line.startswith(("from ", "import "))]
    packages = {line.split()[1].split(".")[0] for line in imported}
    assert packages <= {"collections", "numpy", "torch", "transformers", "models", "tasks"}


def test_outputs_are_those_of_the_row(task):
    rows = task.rows("train").take(np.arange(20))
    teacher = distill.new_model(task, width=16, layers=1, seed=0).eval()
    outputs = distill.outputs_of(teacher, rows)
    batch = collate(rows, np.array([7]), 0)
    expected = torch.log_softmax(distill.logits_at(teacher, batch), -1)
    torch.testing.assert_close(outputs[7].float(), expected, atol=5e-3, rtol=0)
