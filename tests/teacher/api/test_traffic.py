"""Made-up traffic, and its way into a usage log."""

import asyncio
import itertools
from collections import Counter

import numpy as np
import pytest

from tasks.pronounce import Pronounce
from teacher.api.exchange import hashed_address
from teacher.api.replay import SALT, Clock, in_order, is_sent, play
from teacher.api.store import Store
from teacher.api.traffic import ATTACKS, BENIGN, DAY, RING, Ask, Customer, Pool, population
from tests.serving import small_teacher

DAYS = 4


@pytest.fixture(scope="module")
def pool():
    task = Pronounce(limit=3000)
    return Pool.of(task, task.rows("train"), 2000)


@pytest.fixture(scope="module")
def customers(pool):
    return population(pool, 120, 8, DAYS, seed=0)


def of_kind(customers, kind):
    return [one for one in customers if one.kind == kind]


def topics_per_request(pool, one):
    """How many topics a customer has asked about, per request of the first hundred."""
    prompts = [ask.prompt for ask in one.asks[:100]]
    return len({int(pool.topics[prompt]) for prompt in prompts}) / max(1, len(prompts))


def test_a_seed_makes_the_same_population_again(pool, customers):
    assert population(pool, 120, 8, DAYS, seed=0) == customers
    assert population(pool, 120, 8, DAYS, seed=1) != customers
    assert {one.kind for one in customers} == {*BENIGN, *ATTACKS}
    kinds = [one.kind for one in customers]
    assert kinds != sorted(kinds)  # the order of the accounts does not tell


def test_requests_are_in_order_and_within_the_pool(pool, customers):
    for one in customers:
        times = [ask.at for ask in one.asks]
        assert times == sorted(times)
        assert all(0 <= ask.prompt < len(pool.prompts) for ask in one.asks)
        assert all(0 <= at < (DAYS + 1) * DAY for at in times)
        assert (one.tier == "top5-bulk") == any(ask.top_logprobs for ask in one.asks)


@pytest.mark.parametrize("kind", ["naive", "throttled", "hydra"])
def test_who_extracts_asks_nothing_twice(kind, customers):
    for one in of_kind(customers, kind):
        prompts = [ask.prompt for ask in one.asks]
        assert len(set(prompts)) == len(prompts)


def test_the_heads_of_a_hydra_divide_the_pool(customers):
    heads = of_kind(customers, "hydra")
    assert len(heads) == RING
    assert len({one.ring for one in heads}) == 1
    asked = Counter(itertools.chain.from_iterable({a.prompt for a in one.asks} for one in heads))
    assert max(asked.values()) == 1
    assert max(len(one.asks) for one in heads) < min(
        len(one.asks) for one in of_kind(customers, "naive")
    )


def test_kinds_differ_in_how_they_walk(pool, customers):
    breadth = {
        kind: np.mean([topics_per_request(pool, one) for one in of_kind(customers, kind)])
        for kind in (*BENIGN, *ATTACKS)
    }
    assert max(breadth["application"], breadth["batch"]) < 0.2
    assert breadth["chat"] < breadth["camouflaged"] < breadth["throttled"]
    assert breadth["evaluation"] == pytest.approx(breadth["throttled"], abs=0.2)  # hard to tell
    assert breadth["mixed"] > breadth["chat"]


def test_an_evaluation_is_the_same_sample_on_every_day(customers):
    for one in of_kind(customers, "evaluation"):
        times = Counter(ask.prompt for ask in one.asks)
        assert len(set(times.values())) == 1
        assert all(ask.top_logprobs for ask in one.asks)


# -- into the log ----------------------------------------------------------------------------------


def test_every_request_is_one_row_at_its_own_time_sent_or_not(tmp_path):
    asks = [Ask(60.0 * n, n, 1.0, 4, 3 * (n % 2)) for n in range(30)]
    customers = [
        Customer("chat", "top5-bulk", "10.0.0.1", "An agent", asks),
        Customer("naive", "top5-bulk", "10.9.9.9", "Another", asks[:12], ring=3),
    ]
    with small_teacher(tmp_path) as served:
        pool = Pool.of(served.task, served.task.rows("train"), 100)
        clock = Clock(1_000_000.0)
        store = served.service.store = Store(tmp_path / "log.sqlite", clock)
        store.publish_terms("1", "No training.", "no")
        made = [store.add_account(one.kind, one.tier) for one in customers]
        keys = [key for _, key in made]
        asyncio.run(play(served.service, clock, customers, keys, pool, 0.3))
        for (account, _), one in zip(made, customers, strict=True):
            rows = store.usage_of(account)
            assert [row["start"] - 1_000_000.0 for row in rows] == [ask.at for ask in one.asks]
            assert {row["status"] for row in rows} == {"done"}
            assert {row["user_agent"] for row in rows} == {one.agent}
            assert {row["ip_hash"] for row in rows} == {hashed_address(one.address, SALT)}
            assert [row["top_logprobs"] for row in rows] == [ask.top_logprobs for ask in one.asks]
            prompts = [served.task.prompt(pool.prompts[ask.prompt]) for ask in one.asks]
            assert [row["prompt_tokens"] for row in rows] == [len(prompt) for prompt in prompts]
        minutes = {one["minute"] for one in store.traffic(0)}
        assert minutes == {int((1_000_000 + ask.at) // 60) for ask in asks}
        store.close()
    sent = [is_sent(turn, 0.3) for turn in in_order(customers)]
    assert 3 <= sum(sent) <= 25  # both ways were gone
