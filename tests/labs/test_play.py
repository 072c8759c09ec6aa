"""The page to play with a run, in headless Chromium."""

import re
import threading
import time
from types import SimpleNamespace

import httpx2
import pytest
import torch
import uvicorn

import train
from configs.schema import LabError
from experiment.run import Run
from labs.play import Player, Question, application
from models.rows import Rows
from tests.browser import opened, problems_of
from tests.helpers import ROOT

DIGITS = [
    "name=digits", "seeds=[0]", "threads=1", "workers=1", "teacher.epochs=0.2", "tune=null",
    "tuned=null", "recipes={t1: {temperature: 1}}", "verdicts=[]", "controls=[baseline]",
    "students.budget=0.9",
]  # fmt: skip


@pytest.fixture(scope="module")
def served(tiny_run):
    player = Player(Run.finished(tiny_run))
    config = uvicorn.Config(application(player), "127.0.0.1", 0, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield SimpleNamespace(player=player, home=f"http://127.0.0.1:{port}/")
    server.should_exit = True
    thread.join()


def test_three_models_answer_and_each_token_shows_two_distributions(served):
    with opened(served.home) as page:
        page.wait_for_selector("#ask:enabled", timeout=3_000)
        page.fill("#text", "lead")
        page.press("#text", "Enter")
        for column in range(3):
            page.wait_for_selector(f"#said-{column}:has-text('tokens')")
        assert page.eval_on_selector("#model-0", "e => e.value") == "teacher"
        token = page.locator("#tokens-1 button").first
        token.focus()  # by keyboard
        which = page.text_content("#which")
        assert re.search(
            r"of distilled: probability [\d.]+ %; KL from the teacher [\d.]+ nats", which
        )
        assert page.locator("#bars tbody tr").count() >= 6
        assert page.text_content("#theirs") == "teacher"
        page.select_option("#model-2", "written")
        page.wait_for_selector("#said-2:has-text('tokens')")
        costs = page.locator("#cost tbody tr")
        assert costs.count() == len(served.player.models)
        assert "% " not in costs.first.text_content()
        assert costs.first.text_content().startswith("teacher")


def test_the_toy_learns_as_its_objective_says(served):
    found = {}
    with opened(served.home) as page:
        page.emulate_media(reduced_motion="reduce")
        page.reload()
        for objective in ("forward", "reverse"):
            page.select_option("#objective", objective)
            page.click("#learn")
            page.click("#learn")
            said = page.text_content("#toy-says")
            mean, deviation = map(
                float, re.search(r"mean (\S+), standard deviation (\S+),", said).groups()
            )
            found[objective] = mean, deviation
    assert found["forward"][1] > 2  # it covers both modes
    assert found["reverse"][1] < 1.2  # it keeps to one
    assert abs(found["forward"][0]) < 1 < abs(found["reverse"][0])


def test_the_page_passes_axe_at_three_widths_and_in_the_dark(served):
    assert problems_of(served.home) == []


def test_an_answer_is_the_models_own_with_the_teachers_distribution_at_its_tokens(served):
    player = served.player
    found = player.answer(Question(model="distilled", text="lead"))
    assert found == player.answer(Question(model="distilled", text="lead", seed=7)) | {
        "flops": found["flops"]
    }
    prompt = player.task.prompt("lead")
    tokens = [player.task.names.index(t["text"]) for t in found["tokens"] if not t["end"]]
    ids = torch.tensor([[*prompt, *tokens]])
    with torch.no_grad():
        own, theirs = (
            player.models[name].model(ids).logits[0, len(prompt) - 1].log_softmax(-1)
            for name in ("distilled", "teacher")
        )
    first = found["tokens"][0]
    assert first["p"] == pytest.approx(float(own.exp().max()), rel=1e-4)
    assert first["kl"] == pytest.approx(float((theirs.exp() * (theirs - own)).sum()), rel=1e-3)
    teacher = player.answer(Question(model="teacher", text="lead"))
    assert "kl" not in teacher["tokens"][0]
    hot = player.answer(Question(model="teacher", text="lead", temperature=2.0, seed=1))
    most = [max(p for _, p, _ in found["tokens"][0]["outcomes"]) for found in (hot, teacher)]
    assert most[0] < most[1]
    for _, own_p, teachers_p in found["tokens"][0]["outcomes"]:
        assert 0 <= own_p <= 1
        assert 0 <= teachers_p <= 1


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"model": "nobody", "text": "lead"}, 400, "there is no model 'nobody'"),
        ({"model": "teacher", "text": "7"}, 400, ""),
        ({"model": "teacher", "text": "lead", "example": 99}, 400, "there is no example 99"),
        ({"model": "teacher", "text": "lead", "temperature": 99.0}, 422, ""),
        ({"model": "teacher", "text": "a" * 5_000}, 422, ""),
    ],
)
def test_a_question_that_cannot_be_asked_is_refused(body, status, says, served):
    answer = httpx2.post(f"{served.home}answer", json=body)
    assert answer.status_code == status
    assert says in answer.text


def test_another_site_cannot_ask_by_a_name_of_its_own(served):
    answer = httpx2.get(served.home, headers={"host": "evil.example"})
    assert answer.status_code == 400


@pytest.mark.slow
def test_pictures_are_asked_by_example(tmp_path):
    config = str(ROOT / "configs" / "digits.yaml")
    assert train.main([config, *DIGITS, "--runs", str(tmp_path)]) == 0
    player = Player(Run.finished(tmp_path / "digits"))
    about = player.about()
    assert about["pictures"]
    assert about["examples"][0]["image"].startswith("data:image/png;base64,")
    found = player.answer(Question(model="t1", example=3))
    assert len(found["tokens"]) == 1
    rows: Rows = player.rows
    assert found["tokens"][0]["text"] in "0123456789"
    assert len(rows.prompt(player.examples[3])) == 784
    with pytest.raises(LabError, match="there is no model"):
        player.answer(Question(model="t9", example=3))
