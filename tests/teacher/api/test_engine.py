"""Rows that are answered together, each as if it were alone."""

import queue

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from configs.schema import LabError, Model
from models.generate import generate
from models.language import build_model, initialise
from tasks.pronounce import Pronounce
from teacher.api.engine import (
    MOST_PADDING,
    Engine,
    Job,
    Score,
    distribution,
    draw,
    nucleus,
    of_similar_length,
)
from teacher.watermark import Watermark

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def task():
    return Pronounce(limit=300)


@pytest.fixture(scope="module")
def model(task):
    return initialise(build_model(Model(initializer_range=0.2, **SHAPE), task), 0).eval()


@pytest.fixture
def engine(model, task):
    engine = Engine(model, task, most_rows=5)
    yield engine
    engine.close()


def prompts_of(task, count):
    rows = task.rows("train")
    return [rows.prompt(i).tolist() for i in range(count)]


def answered(engine, jobs, later=()) -> None:
    """Submit all, and wait until all are done; the others join while the first are answered."""
    over = queue.SimpleQueue()
    for job in (*jobs, *later):
        job.deliver = lambda step, job=job: over.put(job) if step is None else None
    for job in jobs:
        engine.submit(job)
    for job in later:
        engine.submit(job)
    for _ in (*jobs, *later):
        over.get(timeout=60)


@given(st.lists(st.integers(1, 200), max_size=80))
def test_prompts_are_read_in_groups_with_little_padding(lengths):
    jobs = [Job([1] * length, 1, None) for length in lengths]
    groups = [*of_similar_length(jobs)]
    assert sorted(map(id, jobs)) == sorted(id(job) for group in groups for job in group)
    longest = [len(job.prompt) for group in groups for job in group]
    assert longest == sorted(longest, reverse=True)  # later ones fit into the columns of the first
    for group in groups:
        assert sum(len(group[0].prompt) - len(job.prompt) for job in group) <= MOST_PADDING


def test_who_has_waited_longest_is_next_with_prompts_about_as_long(engine):
    engine.close()  # nothing is answered meanwhile
    lengths = [9, 3, 20, 8, 10, 9, 4, 11]
    engine.backlog = [Job([1] * length, 1, None) for length in lengths]
    order = []
    while engine.backlog:
        order.append([len(job.prompt) for job in engine.joining(answered=1)])
    assert order == [[9, 8, 10, 9], [3, 20, 4, 11]]


def test_answers_are_those_of_generate_whatever_else_is_in_the_batch(engine, model, task):
    prompts = prompts_of(task, 40)
    expected = generate(
        model, [torch.tensor(p) for p in prompts], longest=12, end=task.end,
        vocabulary=task.vocabulary,
    )  # fmt: skip
    jobs = [Job(prompt, 12, None, temperature=0.0) for prompt in prompts]
    answered(engine, jobs[:3], jobs[3:])
    assert [job.tokens for job in jobs] == [answer.tokens.tolist() for answer in expected]
    assert len({len(job.tokens) for job in jobs}) > 1  # some leave earlier than others


def test_a_seed_draws_the_same_answer_alone_and_in_company(engine, task):
    prompts = prompts_of(task, 6)
    together = [Job(prompt, 10, None, seed=i) for i, prompt in enumerate(prompts)]
    answered(engine, together)
    for i, prompt in enumerate(prompts):
        alone = Job(prompt, 10, None, seed=i)
        answered(engine, [alone])
        assert alone.tokens == together[i].tokens
    other = Job(prompts[0], 10, None, seed=99)
    answered(engine, [other])
    assert other.tokens != together[0].tokens


def test_log_probabilities_are_those_that_tokens_are_drawn_from(engine, task):
    steps = []
    job = Job(prompts_of(task, 1)[0], 6, None, temperature=0.7, top_p=0.6, bias={5: 3.0}, seed=1)
    job.wants_log_probs = True
    over = queue.SimpleQueue()
    job.deliver = lambda step: over.put(None) if step is None else steps.append(step)
    engine.submit(job)
    over.get(timeout=60)
    assert steps
    for token, log_probs in steps:
        assert torch.isfinite(log_probs[token])
        kept = log_probs[torch.isfinite(log_probs)]
        torch.testing.assert_close(kept.exp().sum(), torch.tensor(1.0))
        assert len(kept) < task.vocabulary


def test_bias_temperature_and_nucleus_by_hand():
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    job = Job([1], 1, None, temperature=0.5, bias={2: 1.5})
    expected = torch.log_softmax(torch.tensor([4.0, 2.0, 3.0]), -1)
    torch.testing.assert_close(distribution(logits.clone(), [job])[0], expected)
    greedy = Job([1], 1, None, temperature=0.0)
    torch.testing.assert_close(
        distribution(logits.clone(), [greedy])[0], torch.log_softmax(logits[0], -1)
    )
    probabilities = torch.tensor([[0.5, 0.3, 0.2]])
    cut = nucleus(probabilities.log(), torch.tensor([0.7])).exp()
    torch.testing.assert_close(cut, torch.tensor([[0.625, 0.375, 0.0]]))
    torch.testing.assert_close(
        nucleus(probabilities.log(), torch.tensor([0.4])).exp(), torch.tensor([[1.0, 0.0, 0.0]])
    )


def test_draws_follow_the_distribution():
    log_probs = torch.tensor([0.1, 0.6, 0.0, 0.3]).log()
    job = Job([1], 1, None, seed=3)
    drawn = torch.tensor([draw(log_probs, job) for _ in range(4000)])
    shares = torch.bincount(drawn, minlength=4) / 4000
    torch.testing.assert_close(shares, log_probs.exp(), atol=0.03, rtol=0)
    assert shares[2] == 0


def test_an_error_ends_the_jobs_it_hits_and_later_ones_are_answered(engine, task):
    """The thread died, and every later request waited forever."""
    prompt = prompts_of(task, 1)[0]
    over = queue.SimpleQueue()
    broken = Job(prompt, 5, over.put, watermark=Watermark(7, 50_000, 1.0))
    engine.submit(broken)
    assert isinstance(over.get(timeout=60), LabError)
    engine.submit(Score(prompt, over.put, Watermark(7, 50_000, 1.0)))
    assert isinstance(over.get(timeout=60), LabError)
    fine = Job(prompt, 5, None, temperature=0.0)
    answered(engine, [fine])
    assert fine.tokens


def test_a_cancelled_job_ends_and_the_others_go_on(engine, task):
    first, second = (Job(p, 12, None, temperature=0.0) for p in prompts_of(task, 2))
    first.cancelled = True
    answered(engine, [first, second])
    assert first.tokens == []
    assert second.tokens


def test_closing_ends_jobs_that_are_not_done(model, task):
    engine = Engine(model, task)
    over = queue.SimpleQueue()
    job = Job(prompts_of(task, 1)[0], 10_000, None, bias={task.end: -100.0})
    job.deliver = lambda step: over.put(job) if step is None else None
    engine.submit(job)
    engine.close()
    assert over.get(timeout=60) is job


def test_a_model_whose_cache_cannot_be_padded_is_refused(task):
    recurrent = build_model(Model(architecture="mamba", **SHAPE), task)
    with pytest.raises(LabError, match="cannot be served"):
        Engine(recurrent, task)
