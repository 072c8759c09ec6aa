"""An endpoint as a source of outputs, against a real server over a socket."""

import math
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from configs.schema import Api, LabError
from tasks.text import Text
from teacher import offer as module
from teacher.api.tiers import PER_MILLION, TIERS
from teacher.endpoint import Endpoint
from teacher.journal import OVERHEAD, Answer, Journal
from teacher.offer import Offer
from teacher.signal import LOG_ZERO, tail_of
from teacher.source import LocalModel
from tests.helpers import ROOT
from tests.serving import answers, small_teacher

TIER = {"text": "text-bulk", "top_k": "top5-bulk", "logits": "open-bulk"}


@pytest.fixture(scope="module", params=["pronounce by chat", "text by completions"])
def served(request, tmp_path_factory):
    folder, task = tmp_path_factory.mktemp("api"), None
    if request.param.startswith("text"):
        words = "the sea rose and the old ships went out to fish, café or not".split()
        draw = np.random.Generator(np.random.PCG64(0))
        texts = [" ".join(draw.choice(words, 30)) for _ in range(80)]
        (folder / "texts.txt").write_text("\n\n".join(texts), encoding="utf-8")
        task = Text(path=str(folder / "texts.txt"), vocabulary=280, row_tokens=20, prompt_tokens=6)
    with small_teacher(folder, task) as teacher:
        teacher.api = request.param.split()[-1]
        yield teacher


@pytest.fixture
def rows(served):
    return served.task.rows("train").take(np.arange(40))


@pytest.fixture
def endpoint(served, tmp_path):
    """An endpoint with an account of its own and a journal."""
    made = []

    def opened(access="text", k=None, tier=None, journal="journal", **settings):
        account, key = served.store.add_account("A student", tier or TIER[access])
        settings = Api(
            url=served.url, model="small", key_env="KEY", endpoint=served.api, **settings
        )
        offer = Offer.of(served.url, "small", key, settings)
        journal = Journal(tmp_path / f"{journal}.sqlite")
        found = Endpoint(served.task, offer, settings, access, k, journal, seed=0)
        found.account = account
        made.append(found)
        return found

    yield opened
    for one in made:
        one.close()


def local(served, rows):
    return answers(LocalModel(served.model, served.task), rows)


def test_text_is_what_the_weights_answer(served, rows, endpoint):
    expected, found = local(served, rows), answers(endpoint(), rows)
    assert found.keys() == expected.keys()
    for i, row in found.items():
        assert (row.id, row.prompt_length) == (expected[i].id, expected[i].prompt_length)
        wrote = expected[i].tokens[row.prompt_length :]
        read = served.task.encode_answer(served.task.render(wrote))
        read += [served.task.end] if wrote[-1] == served.task.end else []
        assert (
            row.tokens[row.prompt_length :].tolist() == read[: len(row.tokens) - row.prompt_length]
        )
        assert len(row.tokens) == min(row.prompt_length + len(read), served.task.longest_row)
        assert row.log_probs is None


def test_every_log_probability_is_that_of_the_weights(served, rows, endpoint):
    expected = local(served, rows)
    for i, row in answers(endpoint("logits"), rows).items():
        assert row.tokens.tolist() == expected[i].tokens.tolist()
        torch.testing.assert_close(row.log_probs, expected[i].log_probs, atol=1e-4, rtol=1e-4)


def test_the_k_largest_come_with_the_rest_together(served, rows, endpoint):
    expected = local(served, rows)
    for i, row in answers(endpoint("top_k", 5), rows).items():
        top, found = expected[i].log_probs.topk(5), row.log_probs.topk(5)
        torch.testing.assert_close(found.values, top.values, atol=1e-4, rtol=1e-4)
        assert found.indices.tolist() == top.indices.tolist()
        tail = tail_of(expected[i].log_probs, top.indices)
        torch.testing.assert_close(tail_of(row.log_probs, top.indices), tail, atol=1e-4, rtol=1e-4)
        hidden = row.log_probs.scatter(-1, top.indices, torch.nan)
        assert all(len(set(one[~one.isnan()].tolist())) == 1 for one in hidden)


def test_a_seed_draws_the_same_answers_again(rows, endpoint):
    first = answers(endpoint(journal="first"), rows, 1.0)
    again = answers(endpoint(journal="again", at_once=3), rows, 1.0)
    assert [first[i].tokens.tolist() for i in first] == [again[i].tokens.tolist() for i in first]
    assert len({tuple(row.tokens[row.prompt_length :]) for row in first.values()}) > 20


def test_what_is_in_the_journal_is_not_asked_again(served, rows, endpoint):
    first = endpoint("top_k", 3)
    found = answers(first, rows)
    again = endpoint("top_k", 3)
    copied = answers(again, rows)
    assert served.store.usage_of(again.account) == []
    assert again.bill() == first.bill()
    for i, row in copied.items():
        assert row.tokens.tolist() == found[i].tokens.tolist()
        assert row.log_probs.equal(found[i].log_probs)


@pytest.mark.parametrize("access", TIER)
def test_the_bill_is_that_of_the_server(access, served, rows, endpoint):
    one = endpoint(access, 5)
    answers(one, rows)
    bill, found = served.store.bill_of(one.account), one.bill()
    assert found["money"] == pytest.approx(bill.pop("cost") / PER_MILLION**2)
    assert found["money"] > 0
    assert {key: found[key] for key in bill} == bill


@pytest.mark.parametrize("unit", ["tokens", "money"])
def test_a_budget_is_not_exceeded_and_what_was_bought_is_kept(unit, served, rows, endpoint):
    tokens = 8 * OVERHEAD
    budget = {"tokens": tokens, "money": TIERS["text-bulk"].price_out * tokens / PER_MILLION}[unit]
    poor = endpoint(**{f"budget_{unit}": budget}, at_once=4)
    with pytest.raises(LabError, match=r"budget of .* is spent, with \d+ of 40 rows not answered"):
        answers(poor, rows)
    bill = served.store.bill_of(poor.account)
    spent = bill["prompt_tokens"] + bill["completion_tokens"]
    assert 0 < (spent if unit == "tokens" else bill["cost"] / PER_MILLION**2) <= budget
    rich = endpoint()
    answers(rich, rows)
    assert len(served.store.usage_of(rich.account)) == 40 - bill["requests"]


def test_a_rate_limit_is_waited_for(served, rows, endpoint, monkeypatch):
    waited = []

    def pause(self, retry_after):
        waited.append(float(retry_after))
        served.service.requests.storage.reset()

    monkeypatch.setattr(Endpoint, "pause", pause)
    monkeypatch.setattr(module, "RETRIES", 0)
    monkeypatch.setitem(TIERS, "slow", TIERS["text"].__class__("text", 1, 1, requests_per_minute=7))
    slow = endpoint(tier="slow", at_once=2)
    assert len(answers(slow, rows)) == 40
    assert waited
    assert all(1 <= seconds <= 61 for seconds in waited)


def test_what_will_not_pass_is_one_line_and_what_was_bought_is_kept(
    served, rows, endpoint, monkeypatch
):
    monkeypatch.setattr(module, "RETRIES", 0)
    one = endpoint()
    few = rows.take(np.arange(5))
    answers(one, few)
    served.store.set_status(one.account, "suspended")
    with pytest.raises(LabError, match=rf"account {one.account} is suspended"):
        answers(one, rows)
    assert len(answers(endpoint(), few)) == 5
    with pytest.raises(LabError, match="not known, or was replaced"):
        Offer.of(served.url, "small", "sk-lab-wrong", Api())
    with pytest.raises(LabError, match=r"http://127\.0\.0\.1:9/v1 does not answer"):
        Offer.of("http://127.0.0.1:9/v1", "small", "key", Api())


def test_a_quota_that_is_gone_is_not_tried_again(served, rows, endpoint, monkeypatch):
    poor = TIERS["text"].__class__("text", 1, 1, requests_per_minute=None, tokens_per_day=300)
    monkeypatch.setitem(TIERS, "poor", poor)
    one = endpoint(tier="poor")
    with pytest.raises(LabError, match="tokens per day of tier poor"):
        answers(one, rows)
    assert served.store.bill_of(one.account)["requests"] >= 1


def test_a_key_that_is_shown_less_is_refused_before_anything_is_paid(served, rows, endpoint):
    for access, k, tier in (("top_k", 9, "top5-bulk"), ("logits", None, "text-bulk")):
        one = endpoint(access, k, tier, journal=access)
        with pytest.raises(LabError, match="is shown at most"):
            one.require_revealed(served.task.question(rows, 0))
        assert served.store.usage_of(one.account) == []
    endpoint("top_k", 5).require_revealed(served.task.question(rows, 0))


def test_a_server_that_does_not_say_what_it_reveals_is_asked_for_one_token(
    served, rows, endpoint, monkeypatch
):
    from dataclasses import replace

    one = endpoint("top_k", 9, "top5-bulk")
    one.offer = replace(one.offer, access=None)
    for _ in range(2):  # a check that failed is not passed the next time
        with pytest.raises(LabError, match="reveals at most 5"):
            one.require_revealed(served.task.question(rows, 0))
    two = endpoint("top_k", 5)
    two.offer = replace(two.offer, access=None)
    two.require_revealed(served.task.question(rows, 0))
    assert served.store.bill_of(two.account)["completion_tokens"] == 1
    assert two.bill()["completion_tokens"] == 1
    two.require_revealed(served.task.question(rows, 0))
    assert two.bill()["requests"] == 1


def test_nobody_waits_for_a_rate_limit_after_an_error(rows, endpoint, monkeypatch):
    """Ctrl-C, or a refusal, hung until all waiting requests had passed."""
    refused = threading.Event()

    def send(self, question, asked):
        if refused.is_set():
            self.pause("3600")
        refused.set()
        time.sleep(0.2)  # others are waiting by now
        raise LabError("refused")

    monkeypatch.setattr(Endpoint, "send", send)
    started = time.monotonic()
    with pytest.raises(LabError, match="refused"):
        answers(endpoint(at_once=4), rows)
    assert time.monotonic() - started < 60


def test_fewer_log_probabilities_than_are_learned_from_are_refused(served, rows, endpoint):
    """What was missing was made up: ties between tokens that nobody had revealed."""
    choice = chat_choice(served.task, rows.completion(0)[:2].tolist())
    with pytest.raises(LabError, match="reveals 1 log-probabilities per token, and the recipe"):
        endpoint("top_k", 2).read(choice)
    with pytest.raises(LabError, match="reveals 1 log-probabilities"):
        endpoint("logits").read(choice)
    for one in choice["logprobs"]["content"]:  # all others are impossible
        one["top_logprobs"][0]["logprob"] = 0.0
    assert len(endpoint("logits").read(choice).tokens) == 3


def test_revealed_probabilities_never_exceed_one(served, endpoint):
    """A server that rounds shows 0.5 and 0.3 and 0.3."""
    found = Answer.of([1], [{1: math.log(0.7), 2: math.log(0.4), 3: math.log(0.4)}])
    log_probs = found.distribution(1, served.task.vocabulary)[0]
    assert float(log_probs.exp().sum()) == pytest.approx(1)
    assert float(log_probs[1].exp()) == pytest.approx(0.7 / 1.5)


def test_prices_and_terms_that_a_server_does_not_state_are_those_of_the_config(served):
    settings = Api(price_in=3, price_out=7, allows_distillation="no")
    found = Offer.of(f"{served.url}/elsewhere", "small", "key", settings)
    assert (found.access, found.terms, found.allows_distillation) == (None, "unknown", "no")
    assert found.money(1_000_000, 2_000_000) == 17


# -- answers as other servers write them -----------------------------------------------------------


def chat_choice(task, tokens, reason="stop", **logprobs):
    names = [task.token_name(token) for token in tokens]
    content = [
        {"token": name, "logprob": -0.1, "top_logprobs": [{"token": name, "logprob": -0.1}]}
        for name in names
    ]
    return {
        "finish_reason": reason,
        "message": {"content": task.render(tokens)},
        "logprobs": {"content": content} | logprobs,
    }


def test_an_end_mark_that_is_not_shown_is_certain(served, rows, endpoint):
    one, task = endpoint("top_k", 1), served.task
    tokens = rows.completion(0)[:3].tolist()
    found = one.read(chat_choice(task, tokens))
    assert found.tokens.tolist() == [*tokens, task.end]
    log_probs = found.distribution(4, task.vocabulary)
    assert log_probs[-1, task.end] == 0
    assert log_probs[-1, : task.end].max() <= LOG_ZERO + 1
    assert log_probs.exp().sum(-1).tolist() == pytest.approx([1] * 4)
    assert log_probs[0, tokens[0]] == pytest.approx(-0.1)
    cut = one.read(chat_choice(task, tokens, "length"))
    assert cut.tokens.tolist() == tokens
    whole = one.read(chat_choice(task, [*tokens, task.end]))
    assert whole.tokens.tolist() == [*tokens, task.end]


def test_other_tokens_or_no_log_probabilities_are_named(served, rows, endpoint):
    one, choice = endpoint("logits"), chat_choice(served.task, rows.completion(0)[:2].tolist())
    choice["logprobs"]["content"][1]["token"] = "Ġfoo"
    with pytest.raises(LabError, match="other tokens than its student, such as 'Ġfoo'"):
        one.read(choice)
    with pytest.raises(LabError, match="reveals no log-probabilities"):
        one.read(choice | {"logprobs": None})


def test_parts_of_letters_are_read_by_their_bytes_and_an_end_mark_without_text(served, endpoint):
    """llama.cpp writes both as text that cannot be told apart."""
    one, task = endpoint("top_k", 2), served.task
    if task.name != "text":
        pytest.skip("words and phonemes have no parts of letters")
    known = task.tokenizer.get_vocab()
    first, second = known["\u00c3"], known["\u00a9"]  # the bytes of é in byte-level BPE
    assert task.token_name(first) == "bytes:\\xc3"
    pairs = [("\ufffd", [0xC3], -0.1), ("", [], -3.0), ("", [], -5.0)]
    top = [{"token": name, "bytes": text, "logprob": p} for name, text, p in pairs]
    content = [
        {**top[0], "top_logprobs": top},
        {"token": "\ufffd", "bytes": [0xA9], "logprob": -0.2, "top_logprobs": top},
    ]
    choice = {"finish_reason": "length", "text": "é", "logprobs": {"content": content}}
    found = one.read(choice)
    assert found.tokens.tolist() == [first, second]
    log_probs = found.distribution(2, task.vocabulary)
    assert log_probs[0, first] == pytest.approx(-0.1)
    assert log_probs[0, task.end] == pytest.approx(-3.0)


def test_answers_that_the_task_cannot_read_are_left_out(served, rows, endpoint, monkeypatch):
    monkeypatch.setattr(
        served.task, "encode_answer", lambda text: (_ for _ in ()).throw(LabError("?"))
    )
    monkeypatch.setattr(Endpoint, "longest", lambda self, question: 5)
    one = endpoint()
    assert answers(one, rows.take(np.arange(5))) == {}
    assert one.bill()["requests"] == 5
    with pytest.raises(LabError, match="cannot read 11 of the answers"):
        answers(one, rows)


@pytest.mark.parametrize(
    "body",
    [
        b"<html>", b'{"error": {"message": "?"}}', b'{"choices": []}',
        b'{"choices": [{"finish_reason": "stop", "message": {"content": null}}], "usage": null}',
    ],
)  # fmt: skip
def test_an_answer_of_another_shape_is_paid_once_and_left_out(body, rows, endpoint, monkeypatch):
    """It was a traceback, and was asked and paid again at every rerun."""
    monkeypatch.setattr(Endpoint, "send", lambda self, question, asked: body)
    one, few = endpoint(), rows.take(np.arange(5))
    assert answers(one, few) == {}
    assert one.bill()["requests"] == 5
    assert one.bill()["completion_tokens"] > 0  # the most that it can have been
    again = endpoint()
    monkeypatch.setattr(Endpoint, "send", lambda self, question, asked: pytest.fail("asked again"))
    assert answers(again, few) == {}


def test_answers_of_another_teacher_are_not_taken_for_this_one(tmp_path):
    file = tmp_path / "journal.sqlite"
    for _ in range(2):
        Journal(file, "one").database.close()
    with pytest.raises(LabError, match="holds answers of another teacher"):
        Journal(file, "another")


def test_what_is_set_aside_is_asked_again_and_stays_paid(served, rows, endpoint):
    few = rows.take(np.arange(5))
    for times in (1, 2, 3):
        one = endpoint()
        one.journal.set_aside(few.ids[:3].tolist())
        assert len(answers(one, few)) == 5
        assert one.journal.totals()[0] == one.bill()["requests"] == 5 + 3 * (times - 1)


def test_every_request_draws_from_all_tokens_and_has_the_fields_of_the_config(
    served, rows, endpoint, monkeypatch
):
    """Some servers draw from the likeliest tokens only, unless they are told not to."""
    sent = []
    monkeypatch.setattr(
        Endpoint, "send", lambda self, question, asked: sent.append(asked) or b"null"
    )
    few = rows.take(np.arange(1))
    answers(endpoint(body={"top_k": 0}), few, 1.0)
    answers(endpoint(journal="greedy"), few)
    assert (sent[0]["top_p"], sent[0]["extra_body"]) == (1.0, {"top_k": 0})
    assert "top_p" not in sent[1]
    monkeypatch.undo()
    with pytest.raises(LabError, match="top_k: this field is not supported"):
        answers(endpoint(body={"top_k": 0}, journal="sent"), few)


def test_a_proxy_is_not_asked_for_a_server_on_this_machine(rows, endpoint, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert len(answers(endpoint(), rows.take(np.arange(3)))) == 3


# -- killed ----------------------------------------------------------------------------------------

COLLECT = """
import sys
import numpy as np, torch
from pathlib import Path
from configs.schema import Api
from tasks.pronounce import Pronounce
from teacher.endpoint import Endpoint
from teacher.journal import Journal
from teacher.offer import Offer

url, key, journal = sys.argv[1:]
task, settings = Pronounce(limit=300), Api(url=url, model="small", key_env="KEY", at_once=4)
rows = task.rows("train").take(np.arange(200))
offer = Offer.of(url, "small", key, settings)
source = Endpoint(task, offer, settings, "text", None, Journal(Path(journal)), 0)
print("begins", flush=True)
print(len([*source.answer(rows, 1.0, False, torch.Generator())]), flush=True)
"""


@pytest.mark.slow
def test_after_a_kill_no_answer_is_paid_again_but_those_in_flight(tmp_path):
    with small_teacher(tmp_path) as served:
        account, key = served.store.add_account("A student", "text-bulk")
        command = [sys.executable, "-c", COLLECT, served.url, key, str(tmp_path / "journal.sqlite")]
        kills, draws = 0, np.random.Generator(np.random.PCG64(0))
        while True:
            process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
            assert process.stdout.readline() == "begins\n"
            if kills == 5:
                break
            time.sleep(draws.uniform(0, 0.15))
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
            kills += 1
        assert process.communicate()[0] == "200\n"
        served.service.store.close_interrupted()
        paid = served.store.bill_of(account)["requests"]
        assert 200 <= paid <= 200 + 4 * kills
