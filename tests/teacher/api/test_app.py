"""The server, asked by OpenAI's own client over a socket."""

import asyncio
import json
import re
import shlex
import socket
import subprocess
import time
from contextlib import redirect_stdout, suppress
from io import StringIO

import httpx2
import openai
import pytest
import torch

from teacher.api import app
from teacher.api.app import LARGEST_BODY
from teacher.api.exchange import Exchange, Origin
from teacher.api.requests import ChatRequest
from teacher.api.service import Service
from teacher.api.shapes import ChatShape
from teacher.api.tiers import TIERS
from tests.helpers import ROOT
from tests.serving import small_teacher


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with small_teacher(tmp_path_factory.mktemp("api")) as teacher:
        yield teacher


@pytest.fixture
def client_of(served):
    """A client with an account of its own of this tier."""
    clients = []

    def client(tier="open", **options):
        account, key = served.store.add_account("A reader", tier)
        client = openai.OpenAI(
            api_key=key, base_url=f"http://127.0.0.1:{served.port}/v1", max_retries=0, **options
        )
        client.account = account
        clients.append(client)
        return client

    yield client
    for client in clients:
        client.close()


def chat(client, question="lead", **options):
    messages = [{"role": "user", "content": question}]
    return client.chat.completions.create(model="small", messages=messages, **options)


def last_row(served, client):
    return served.store.usage_of(client.account)[-1]


def test_the_model_is_listed(client_of):
    client = client_of()
    assert [model.id for model in client.models.list()] == ["small"]
    assert client.models.retrieve("small").id == "small"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("large")


def test_an_answer_is_that_of_the_model_and_is_charged(served, client_of):
    client = client_of("top5")
    found = chat(client, temperature=0)
    prompt = served.task.prompt("lead")
    assert found.usage.prompt_tokens == len(prompt)
    row = last_row(served, client)
    assert (row["status"], row["completion_tokens"]) == ("done", found.usage.completion_tokens)
    assert row["cost"] == TIERS["top5"].cost(len(prompt), found.usage.completion_tokens)
    assert row["ip_hash"] not in (None, "", "127.0.0.1")
    again = chat(client, temperature=0)
    assert again.choices[0].message.content == found.choices[0].message.content


def test_a_stream_carries_the_same_answer_and_its_usage(served, client_of):
    client = client_of()
    whole = chat(client, temperature=0)
    chunks = [*chat(client, temperature=0, stream=True, stream_options={"include_usage": True})]
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert [c for c in chunks if c.choices][-1].choices[0].finish_reason in ("stop", "length")
    assert chunks[-1].usage == whole.usage
    assert last_row(served, client)["completion_tokens"] == whole.usage.completion_tokens


def test_log_probabilities_are_the_models_and_only_as_many_as_the_tier_has(served, client_of):
    found = chat(client_of("open"), temperature=0, logprobs=True, top_logprobs=72)
    first = found.choices[0].logprobs.content[0]
    prompt = torch.tensor([served.task.prompt("lead")])
    expected = torch.log_softmax(served.model(prompt).logits[0, -1].detach(), -1)
    assert len(first.top_logprobs) == served.task.vocabulary
    for one in first.top_logprobs:
        token = served.task.token_ids[one.token]
        assert one.logprob == pytest.approx(float(expected[token]), abs=1e-4)
    assert len(chat(client_of("top5"), logprobs=True, top_logprobs=5).choices[0].logprobs.content)
    for tier, count in (("top5", 6), ("top20", 21), ("text", 0)):
        with pytest.raises(openai.PermissionDeniedError, match="reveals at most"):
            chat(client_of(tier), logprobs=True, top_logprobs=count)


def test_a_bias_moves_the_answer_where_the_tier_has_one(served, client_of):
    token = served.task.token_ids["K"]
    found = chat(client_of("top5"), temperature=0, logit_bias={str(token): 100}, max_tokens=3)
    assert found.choices[0].message.content == "K K K"
    assert found.choices[0].finish_reason == "length"
    with pytest.raises(openai.PermissionDeniedError, match="no logit_bias"):
        chat(client_of("text"), logit_bias={str(token): 100})
    with pytest.raises(openai.BadRequestError, match="is no token id"):
        chat(client_of("top5"), logit_bias={"999": 1})


def test_several_answers_differ_and_a_seed_repeats_them(client_of):
    client = client_of()
    first = chat(client, n=4, seed=7, max_tokens=8)
    assert [choice.index for choice in first.choices] == [0, 1, 2, 3]
    texts = [choice.message.content for choice in first.choices]
    assert len(set(texts)) > 1
    again = chat(client, n=4, seed=7, max_tokens=8)
    assert [choice.message.content for choice in again.choices] == texts


def test_a_stop_ends_the_answer_before_it(client_of):
    client = client_of()
    whole = chat(client, temperature=0).choices[0].message.content
    stop = whole.split()[1]
    found = chat(client, temperature=0, stop=[f" {stop}"]).choices[0]
    assert found.message.content == whole[: whole.index(f" {stop}")]
    assert found.finish_reason == "stop"


def test_completions_read_tokens_as_they_are(served, client_of):
    client = client_of()
    prompt = served.task.prompt("lead")
    found = client.completions.create(
        model="small", prompt=prompt, temperature=0, max_tokens=5, logprobs=2
    )
    assert (
        found.choices[0].text
        == chat(client, temperature=0, max_tokens=5).choices[0].message.content
    )
    assert len(found.choices[0].logprobs.top_logprobs[0]) == 2
    text = "".join(
        part.choices[0].text
        for part in client.completions.create(
            model="small", prompt=prompt, temperature=0, max_tokens=5, stream=True
        )
    )
    assert text == found.choices[0].text
    with pytest.raises(openai.BadRequestError, match="no tokens"):
        client.completions.create(model="small", prompt=[999])


def test_a_text_is_scored_token_by_token(served, client_of):
    client, rows = client_of("top20"), served.task.rows("train")
    tokens = rows.row(0).tolist()
    found = client.completions.create(
        model="small", prompt=tokens, max_tokens=0, echo=True, logprobs=3
    )
    scores = found.choices[0].logprobs
    with torch.no_grad():
        logits = served.model(torch.tensor([tokens])).logits[0, :-1]
    expected = torch.log_softmax(logits, -1).gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0]
    assert scores.token_logprobs[0] is None
    assert scores.token_logprobs[1:] == pytest.approx(expected.tolist(), abs=1e-4)
    assert [served.task.token_ids[token] for token in scores.tokens] == tokens
    assert all(len(top) == 3 for top in scores.top_logprobs[1:])
    assert found.usage.completion_tokens == 0
    assert last_row(served, client)["prompt_tokens"] == len(tokens)
    with_answer = client.completions.create(
        model="small", prompt=tokens[:5], max_tokens=2, echo=True, logprobs=1, temperature=0
    ).choices[0]
    assert len(with_answer.logprobs.tokens) == 7
    with pytest.raises(openai.PermissionDeniedError):
        client_of("text").completions.create(
            model="small", prompt=tokens, max_tokens=0, echo=True, logprobs=0
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"extra_body": {"top_k": 3}}, "top_k: this field is not supported"),
        ({"extra_body": {"generation_config": {}}}, "not supported"),
        ({"temperature": 3}, "temperature: "),
        ({"top_p": 0}, "top_p: "),
        ({"n": 65}, "n: "),
        ({"max_tokens": 500}, "exceed the 72 tokens"),
        ({"top_logprobs": 2}, "needs logprobs"),
        ({"extra_body": {"n": "2"}}, "n: "),
    ],
)
def test_what_cannot_be_done_is_refused_by_name_and_costs_nothing(
    options, message, served, client_of
):
    client = client_of()
    with pytest.raises(openai.BadRequestError, match=message):
        chat(client, **options)
    assert served.store.usage_of(client.account) == []


@pytest.mark.parametrize("question", ["", "9", "x" * 200])
def test_a_prompt_that_the_task_cannot_read_is_refused(question, client_of):
    with pytest.raises(openai.BadRequestError):
        chat(client_of(), question)


def test_only_one_message_of_the_user_is_answered(client_of):
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "lead"}]
    with pytest.raises(openai.BadRequestError, match="one message of the user"):
        client_of().chat.completions.create(model="small", messages=messages)


def test_keys_and_accounts_are_checked(served, client_of):
    client = client_of()
    for key in ("sk-lab-wrong", "é"):
        headers = {"authorization": f"Bearer {key}".encode()}
        response = httpx2.get(f"http://127.0.0.1:{served.port}/v1/models", headers=headers)
        assert response.status_code == 401
        assert response.headers["x-should-retry"] == "false"
    served.store.set_status(client.account, "suspended")
    with pytest.raises(openai.PermissionDeniedError, match="is suspended"):
        chat(client)
    served.store.set_status(client.account, "active")
    served.store.rotate_key(client.account)
    with pytest.raises(openai.AuthenticationError):
        chat(client)


def test_a_limit_says_when_to_come_back_and_a_quota_that_it_is_gone(served, client_of, monkeypatch):
    few = TIERS["text"].__class__("text", 0.1, 0.4, requests_per_minute=2)
    monkeypatch.setitem(TIERS, "few", few)
    client = client_of("few")
    for _ in range(2):
        chat(client, max_tokens=1)
    with pytest.raises(openai.RateLimitError) as error:
        chat(client, max_tokens=1)
    assert 1 <= int(error.value.response.headers["retry-after"]) <= 61
    assert error.value.code == "rate_limit_exceeded"
    little = few.__class__("text", 0.1, 0.4, tokens_per_day=20)
    monkeypatch.setitem(TIERS, "little", little)
    client = client_of("little")
    chat(client, max_tokens=1)
    with pytest.raises(openai.RateLimitError) as error:
        chat(client, max_tokens=15)
    assert error.value.code == "insufficient_quota"
    assert error.value.response.headers["x-should-retry"] == "false"
    assert len(served.store.usage_of(client.account)) == 1


def post(served, client, content, path="/v1/chat/completions"):
    return httpx2.post(
        f"http://127.0.0.1:{served.port}{path}",
        content=content,
        headers={"authorization": f"Bearer {client.api_key}"},
    )


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b"{", 400, "invalid_json"),
        (b"\xff\xfe{}", 400, "invalid_json"),
        (b"[" * 100_000, 400, "invalid_json"),
        (b"[]", 400, "invalid_value"),
        (b"null", 400, "invalid_value"),
        (b" " * (LARGEST_BODY + 1), 413, "body_too_large"),
    ],
    ids=["cut", "no UTF-8", "deep", "a list", "null", "large"],
)
def test_a_body_that_is_no_request_is_an_error_in_one_shape(
    content, status, code, served, client_of
):
    response = post(served, client_of(), content)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_other_addresses_are_not_found(served, client_of):
    assert post(served, client_of(), b"{}", "/v1/embeddings").status_code == 404


@pytest.mark.parametrize("streams", [True, False])
def test_a_client_that_leaves_ends_its_answer_and_is_charged_once_for_what_there_was(
    streams, served, client_of, monkeypatch
):
    client, forward, failed = client_of(), served.engine.forward, []
    finish = served.store.finish
    monkeypatch.setattr(
        served.store, "finish", lambda *a, **k: (failed.extend(a[2:3]), finish(*a, **k))
    )

    def slow(*arguments):
        time.sleep(0.03)  # so that the answer cannot be complete before the client is gone
        return forward(*arguments)

    monkeypatch.setattr(served.engine, "forward", slow)
    body = {
        "model": "small", "messages": [{"role": "user", "content": "lead"}], "stream": streams,
        "max_tokens": 60, "logit_bias": {str(served.task.end): -100},
    }  # fmt: skip
    request = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer "
            + client.api_key.encode()
            + f"\r\ncontent-length: {len(request)}\r\n\r\n".encode()
            + request
        )
        received = b""
        while streams and received.count(b"data: ") < 4:  # the opening, and three tokens
            received += connection.recv(1000)
        time.sleep(0.0 if streams else 0.3)
    for _ in range(200):
        row = last_row(served, client)
        if row["status"] != "running":
            break
        time.sleep(0.02)
    assert row["status"] == "disconnected"
    assert (3 if streams else 1) <= row["completion_tokens"] < 60
    assert "failed" not in failed  # an incomplete answer was made into a response
    assert row["cost"] == TIERS["open"].cost(row["prompt_tokens"], row["completion_tokens"])
    assert len(served.store.usage_of(client.account)) == 1


def test_a_stream_that_nobody_reads_gives_its_reservation_back(served, client_of):
    """Its row was running, and held tokens of the day, until the server was started again."""
    client = client_of()
    account = served.service.account(f"Bearer {client.api_key}")
    body = ChatRequest(model="small", messages=[{"role": "user", "content": "lead"}], stream=True)
    origin = Origin("/v1/chat/completions", "", "")
    prompt = served.task.prompt("lead")
    exchange = Exchange(served.service, origin, account, body, prompt, "lead", 9)
    exchange.admit(False, 0)
    shape = ChatShape(body, served.service)
    shape.begin(exchange.request_id, prompt)
    response = app.Streamed(exchange, app.stream(exchange, shape))

    async def gone(message=None):
        raise OSError("the client is gone")

    with suppress(Exception):
        asyncio.run(response({"type": "http", "asgi": {"spec_version": "2.4"}}, gone, gone))
    row = last_row(served, client)
    assert (row["status"], row["completion_tokens"]) == ("disconnected", 0)


def test_a_body_that_does_not_arrive_is_not_waited_for(served, client_of, monkeypatch):
    monkeypatch.setattr(app, "BODY_SECONDS", 0.2)
    key = client_of().api_key.encode()
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer " + key
            + b"\r\ncontent-length: 100\r\n\r\n{"
        )  # fmt: skip
        assert b" 408 " in connection.recv(1000).splitlines()[0]


def test_an_error_of_the_server_has_the_same_shape_and_costs_nothing(
    served, client_of, monkeypatch
):
    client = client_of()

    def broken(*_):
        raise RuntimeError("secret")

    monkeypatch.setattr(Service, "grow", broken)
    with pytest.raises(openai.InternalServerError, match="an error of the server"):
        chat(client)
    row = last_row(served, client)
    assert row["status"] != "running"
    assert row["completion_tokens"] == 0


def test_the_commands_of_the_page_work_as_printed(served, client_of):
    """The lines of docs/api.md, with another address, model and key."""
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    page = page.replace("8000", str(served.port)).replace('"quickstart"', '"small"')
    (lines,) = re.findall(r"^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    client, outputs = client_of("top5"), []
    for line in lines.splitlines():
        words = [word.replace("$KEY", client.api_key) for word in shlex.split(line)]
        done = subprocess.run(words, capture_output=True, check=True, timeout=60)
        outputs.append(done.stdout.decode())
    models, whole, scored, streamed = outputs
    assert json.loads(models)["data"][0]["id"] == "small"
    assert json.loads(whole)["usage"]["total_tokens"] > 10
    assert len(json.loads(scored)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]) == 5
    assert streamed.rstrip().endswith("data: [DONE]")
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    names = {"KEY": client.api_key}
    with redirect_stdout(StringIO()) as printed:
        exec(code, names)
    names["client"].close()
    assert printed.getvalue().split()[-1].isdecimal()


def test_the_page_lists_every_tier():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| `(\w+)` \|", page, re.MULTILINE))
    listed = {name: tier.access for name, tier in TIERS.items() if "-bulk" not in name}
    assert rows == listed
    assert "`-bulk`" in page
    words = {"none": 0, "five": 5, "twenty": 20}
    shown = re.findall(r"^\| `(\w+)` \| `\w+` \| (none|five|twenty) \| (yes|no) \|", page, re.M)
    assert [name for name, *_ in shown] == ["text", "top5", "top20"]
    for name, count, bias in shown:
        tier = TIERS[name]
        assert (tier.most_alternatives(100), tier.logit_bias) == (words[count], bias == "yes")
