"""What a server does to its answers: every way to see them shows the same."""

import queue

import numpy as np
import pytest
import torch
from openai import OpenAI

from teacher.api.defence import Defence
from teacher.api.engine import Job, distribution
from teacher.api.requests import ChatRequest
from teacher.api.store import Account
from teacher.watermark import KeyFile, Watermark, green, key_of_account
from tests.serving import small_teacher

KEY = KeyFile(key=123_456_789, salt="secret")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    defence = Defence(KEY, 2.0, per_account=True, decimals=2)
    with small_teacher(tmp_path_factory.mktemp("defended"), defence=defence) as teacher:
        teacher.account, key = teacher.store.add_account("A reader", "internal")
        teacher.client = OpenAI(base_url=teacher.url, api_key=key, max_retries=0)
        teacher.mark = Watermark(key_of_account(KEY, teacher.account), teacher.task.vocabulary, 2.0)
        yield teacher
        teacher.client.close()


def marked(served, tokens):
    """Log-probabilities [V] of the next token as this account may see them."""
    with torch.no_grad():
        logits = served.model(torch.tensor([tokens])).logits[0, -1, : served.task.vocabulary]
    return torch.round(served.mark.raised(logits.log_softmax(-1), tokens[-1]), decimals=2)


def test_log_probabilities_are_those_of_the_marked_answer_rounded(served):
    task = served.task
    chat = served.client.chat.completions.create(
        model="small", messages=[{"role": "user", "content": "lead"}], temperature=1, seed=3,
        logprobs=True, top_logprobs=task.vocabulary,
    ).choices[0]  # fmt: skip
    so_far = task.prompt("lead")
    ids = {task.token_name(token): token for token in range(task.vocabulary)}
    for one in chat.logprobs.content:
        expected = marked(served, so_far)
        shown = {ids[other.token]: other.logprob for other in one.top_logprobs}
        for token, value in shown.items():
            assert value == pytest.approx(float(expected[token]), abs=0.011)  # of two roundings
            assert value == pytest.approx(round(value, 2), abs=1e-6)
        so_far.append(ids[one.token])
    assert len(chat.logprobs.content) > 1


def test_a_scored_text_does_not_bypass_the_mark(served):
    tokens = [*served.task.prompt("lead"), 9, 8, 7]
    scored = served.client.completions.create(
        model="small", prompt=tokens, max_tokens=0, echo=True, logprobs=1
    )
    for place in range(1, len(tokens)):
        expected = float(marked(served, tokens[:place])[tokens[place]])
        shown = scored.choices[0].logprobs.token_logprobs[place]
        assert shown == pytest.approx(expected, abs=0.011)


def test_the_log_names_the_key_and_does_not_hold_it(served):
    served.client.completions.create(model="small", prompt=[1, 5], max_tokens=2)
    row = served.store.usage_of(served.account)[-1]
    assert row["watermark"] == served.mark.name
    assert str(KEY.key) not in str([*row])
    assert KEY.salt not in str([*row])
    assert str(served.mark.key) not in str([*row])


def test_answers_are_marked_whatever_else_is_in_the_batch():
    vocabulary = 12
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, vocabulary, generator=generator)
    marks = [None, Watermark(7, vocabulary, 1.0), Watermark(9, vocabulary, 3.0), None]
    marks[3] = marks[1]
    jobs = [Job([1, 2 + n], 5, None, temperature=0.8, watermark=m) for n, m in enumerate(marks)]
    jobs[3].tokens = [11]
    together = distribution(logits.clone(), jobs)
    for row, job in enumerate(jobs):
        alone = torch.log_softmax(logits[row] / 0.8, -1)
        if job.watermark:
            last = (job.tokens or job.prompt)[-1]
            raised = alone + job.watermark.bias * green(job.watermark.key, vocabulary)[last]
            alone = raised.log_softmax(-1)
        torch.testing.assert_close(together[row], alone)


def account(**more):
    return Account("acct-1", "A reader", "text", "active", "1", "key-1", **more)


def test_without_a_key_nothing_is_marked():
    assert Defence().watermark(account(), (1, 5), 10) is None
    assert Defence(decimals=1).watermark(account(bias=2.0), (1, 5), 10) is None
    assert Defence(canaries=1.0).canary("acct-1", (1, 5)) is None
    values = torch.tensor(np.linspace(-3, 0, 7))
    assert Defence().shown(values) is values


def test_an_account_can_have_a_mark_of_its_own_strength():
    assert Defence(KEY, 1.0).watermark(account(), (1, 5), 10) == Watermark(KEY.key, 10, 1.0)
    assert Defence(KEY).watermark(account(bias=2.0), (1, 5), 10) == Watermark(KEY.key, 10, 2.0)
    assert Defence(KEY, 1.0).watermark(account(bias=0.0), (1, 5), 10) is None


PROMPTS = [(1, 2 + number // 50, 2 + number % 50) for number in range(2000)]


def test_a_share_of_the_prompts_is_marked_whoever_asks_and_whenever():
    defence = Defence(KEY, 1.0, share=0.2)
    marked = {prompt for prompt in PROMPTS if defence.watermark(account(), prompt, 10)}
    assert 0.17 < len(marked) / len(PROMPTS) < 0.23
    other = Account("acct-2", "Another", "text", "active", "1", "key-2")
    assert marked == {prompt for prompt in PROMPTS if defence.watermark(other, prompt, 10)}
    all_marked = account(share=1.0)
    assert all(defence.watermark(all_marked, prompt, 10) for prompt in PROMPTS)


def test_the_key_chooses_the_canary_of_an_account_among_two():
    defence = Defence(KEY, canaries=0.3)
    found = {prompt: defence.canary("acct-1", prompt) for prompt in PROMPTS}
    chosen = {prompt: seeds for prompt, seeds in found.items() if seeds}
    assert 0.26 < len(chosen) / len(PROMPTS) < 0.34
    others = {prompt: defence.canary("acct-2", prompt) for prompt in chosen}
    assert all({*seeds} == {*others[prompt]} for prompt, seeds in chosen.items())
    same = sum(seeds == others[prompt] for prompt, seeds in chosen.items()) / len(chosen)
    assert 0.42 < same < 0.58
    assert len({*sum(chosen.values(), ())}) == 2 * len(chosen)


def test_a_canary_answer_is_the_one_of_its_seed_whatever_temperature_is_asked_for(tmp_path):
    defence = Defence(KEY, canaries=1.0)
    with small_teacher(tmp_path, defence=defence) as teacher:
        name, key = teacher.store.add_account("A reader", "internal")
        client = OpenAI(base_url=teacher.url, api_key=key, max_retries=0)
        asked = {"model": "small", "messages": [{"role": "user", "content": "lead"}]}
        sent = {
            client.chat.completions.create(**asked, temperature=t).choices[0].message.content
            for t in (0, 0.5, 1)
        }
        (row, *_) = teacher.store.canaries(name, 9)
        seeds = defence.canary(name, teacher.task.prompt("lead"))
        answers = []
        for seed in seeds:
            (job,) = teacher.service.jobs(
                ChatRequest(**asked, temperature=0), teacher.task.prompt("lead"),
                row["max_tokens"], {}, False, canary=seed,
            )  # fmt: skip
            answers.append(whole(teacher, job))
        assert sent == {answers[0]}
        assert answers[0] != answers[1]
        plain = {
            choice.message.content
            for more in ({"n": 2}, {"logit_bias": {"5": 1}})
            for choice in client.chat.completions.create(**asked, temperature=0, **more).choices
        }
        assert not plain & {*answers}
        rows = teacher.store.usage_of(name)
        assert [row["canary"] for row in rows] == [1, 1, 1, 0, 0]
        assert {row["temperature"] for row in rows[:3]} == {1.0}
        client.close()


def whole(teacher, job):
    """The text of an answer that nobody asked for over HTTP."""
    ended = queue.SimpleQueue()
    job.deliver = lambda step: ended.put(None) if step is None else None
    teacher.engine.submit(job)
    ended.get()
    tokens = [token for token in job.tokens if token != teacher.task.end]
    return teacher.task.render(tokens)


def test_a_forced_temperature_overrides_what_is_asked_for(tmp_path):
    with small_teacher(tmp_path, defence=Defence(temperature=0.0)) as teacher:
        name, key = teacher.store.add_account("A reader", "internal")
        client = OpenAI(base_url=teacher.url, api_key=key, max_retries=0)
        asked = {"model": "small", "messages": [{"role": "user", "content": "lead"}]}
        sent = {
            client.chat.completions.create(**asked, temperature=2, seed=n)
            .choices[0]
            .message.content
            for n in range(4)
        }
        assert len(sent) == 1
        (row, *_) = teacher.store.usage_of(name)
        assert row["temperature"] == 0.0  # as it was drawn
        assert teacher.store.sampled(name, 9) == []
        client.close()
