"""Antidistillation: a teacher that avoids what would teach a proxy well."""

import json
import queue

import numpy as np
import pytest
import torch

import eval as judge
from configs.schema import LabError, Model
from experiment.run import Run
from models.generate import answers_of
from models.language import build_model, initialise
from tasks.pronounce import Pronounce
from teacher.antidistillation import STEP, Antidistilled, gradient_of_loss, moved, norm
from teacher.api.engine import Engine, Job
from teacher.shards import read_provenance
from tests.helpers import train_tiny

SHAPE = {"num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.3}


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def parts(request):
    """task, teacher, proxy, gradient."""
    task = Pronounce(limit=200)
    model = Model(architecture=request.param, hidden_size=16, **SHAPE)
    teacher = initialise(build_model(model, task), 0).eval()
    proxy = initialise(build_model(Model(hidden_size=8, **SHAPE), task), 1).eval()
    rows = task.rows("validation")
    return task, teacher, proxy, gradient_of_loss(proxy, task, rows)


def test_the_gradient_is_that_of_the_mean_loss_of_all_completions(parts):
    task, _, proxy, gradient = parts
    rows = task.rows("validation")
    total, count = 0.0, 0
    for i in range(len(rows)):
        row, start = torch.tensor(rows.row(i).tolist()), int(rows.prompt_lengths[i])
        log_probs = proxy(row[None]).logits[0, start - 1 : -1, : task.vocabulary].log_softmax(-1)
        total = total - log_probs.gather(-1, row[start:, None]).sum()
        count += len(row) - start
    expected = torch.autograd.grad(total / count, [*proxy.parameters()])
    for found, wanted in zip(gradient, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)


def test_log_probabilities_move_along_the_derivative(parts):
    task, teacher, proxy, gradient = parts
    ids = torch.tensor([task.prompt("lead")])
    with torch.no_grad():
        plain = teacher(ids).logits.log_softmax(-1)
        found = Antidistilled(teacher, proxy, gradient, 3.0)(ids).logits
        ahead, behind = (
            moved(proxy, gradient, sign * STEP)(ids).logits.log_softmax(-1) for sign in (1, -1)
        )
    torch.testing.assert_close(found, plain + 3.0 * (ahead - behind) / (2 * STEP))
    assert float((found - plain).abs().max()) > 0.1


def test_a_step_along_the_gradient_has_its_length_and_raises_the_loss(parts):
    task, _, proxy, gradient = parts
    other = moved(proxy, gradient, 0.01)
    difference = [a - b for a, b in zip(other.parameters(), proxy.parameters(), strict=True)]
    assert norm(difference) == pytest.approx(0.01 * norm([*proxy.parameters()]), rel=1e-3)
    rows = task.rows("validation")

    def loss(model):
        ids = torch.tensor(rows.row(0).tolist())
        start = int(rows.prompt_lengths[0])
        logits = model(ids[None]).logits[0, start - 1 : -1, : task.vocabulary]
        return float(torch.nn.functional.cross_entropy(logits, ids[start:]).detach())

    single = gradient_of_loss(proxy, task, rows.take(np.array([0])))
    assert loss(moved(proxy, single, 0.001)) > loss(proxy) > loss(moved(proxy, single, -0.001))


def test_answers_are_the_same_with_a_cache_without_and_served(parts):
    task, teacher, proxy, gradient = parts
    model = Antidistilled(teacher, proxy, gradient, 0.5).eval()
    rows = task.rows("heldout").take(np.arange(6))
    answers = dict(answers_of(model, rows, longest=8, end=task.end, vocabulary=task.vocabulary))
    engine, ended = Engine(model, task), queue.SimpleQueue()
    jobs = []
    for i in range(len(rows)):
        tokens = rows.prompt(i).tolist()
        job = Job(list(tokens), 8, lambda step: ended.put(step) if step is None else None, 0.0)
        engine.submit(job)
        jobs.append(job)
        alone = []
        with torch.no_grad():
            while len(alone) < 8 and alone[-1:] != [task.end]:
                logits = model(torch.tensor([tokens + alone]), use_cache=False).logits
                alone.append(int(logits[0, -1, : task.vocabulary].argmax()))
        assert answers[i].tokens.tolist() == alone
    for _ in jobs:
        ended.get()
    engine.close()
    assert [job.tokens for job in jobs] == [answers[i].tokens.tolist() for i in range(len(rows))]


def test_layers_that_cannot_share_a_cache_are_refused(parts):
    task, _, proxy, gradient = parts
    model = Model(architecture="mamba", hidden_size=16, num_hidden_layers=1, num_attention_heads=1)
    with pytest.raises(LabError, match="mamba has other layers"):
        Antidistilled(build_model(model, task), proxy, gradient, 1.0)


def test_a_proxy_is_trained_before_the_answers_that_avoid_teaching_it(tmp_path):
    recipes = (
        "recipes={poisoned: {access: text, sequences: teacher, objective: cross_entropy,"
        " outputs: {temperature: 1, transfer_rows: 150, antidistillation: 5, proxy: proxy}},"
        " plain: {access: text, sequences: teacher, objective: cross_entropy,"
        " outputs: {temperature: 1, transfer_rows: 150}},"
        " proxy: {access: none, objective: cross_entropy, student: {seeds: 1}}}"
    )
    shared = ("controls=[]", "verdicts=[]", "seeds=[0]")
    assert train_tiny(tmp_path, recipes, *shared) == 0
    run = Run.finished(tmp_path / "tiny")
    stages = [*run.manifest["stages"]]
    (made,) = [stage for stage in stages if "antidistillation" in stage]
    assert stages.index("students/proxy/seed-0") < stages.index(made)
    binding = read_provenance(run.folder / made)["binding"]
    assert binding["proxy_sha256"] == run.manifest["stages"]["students/proxy/seed-0"]["sha256"]
    assert judge.main([str(run.folder)]) == 0
    found = json.loads((run.folder / "eval.json").read_text("utf-8"))["defence"]
    free, defended = found["settings"]
    assert (free["antidistillation"], defended["antidistillation"]) == (0.0, 5.0)
    assert free["kl_teacher_student"] == pytest.approx(0, abs=1e-6)
    assert defended["kl_teacher_student"] > 0
    assert {one["antidistillation"] for one in found["cells"]} == {0.0, 5.0}


@pytest.mark.parametrize(
    ("outputs", "problem"),
    [
        ("{antidistillation: 1}", "set both or neither"),
        ("{proxy: b}", "set both or neither"),
        ("{antidistillation: 1, proxy: c}", "no recipe 'c'"),
        ("{antidistillation: 1, proxy: a}", "need each other in a circle"),
    ],
)
def test_what_antidistillation_needs_is_said(outputs, problem, tmp_path, capsys):
    recipes = (
        "recipes={a: {access: text, sequences: teacher, objective: cross_entropy,"
        f" outputs: {outputs}}}, b: {{access: none, objective: cross_entropy}}}}"
    )
    assert train_tiny(tmp_path, recipes, "controls=[]", "verdicts=[]") == 2
    assert problem in capsys.readouterr().err
