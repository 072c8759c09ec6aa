"""Made-up traffic: customers of four kinds, and extractors of five, for a usage log to look at.

Every customer is a list of requests with their times. Their prompts come from one pool of the
task's training rows, grouped by topic (the documents that rows are from, or their neighbours). What
tells the kinds apart is how they walk through the pool, when, and what they ask to be shown:

chat         sessions at the hours of its user, about a few topics, in order
application  a steady stream about few topics, the same prompts again and again, greedy
batch        once a day a long run over neighbouring prompts
evaluation   every day the same broad sample with log-probabilities: the hard negative
naive        the pool in random order, as fast as a minute's limit allows
throttled    the same at a few requests an hour, in the daytime
mixed        a chat customer that hides extraction between its own questions
hydra        the pool divided among many accounts, each of which asks little
camouflaged  sessions as of a chat customer, but every topic once until the pool is covered
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.random import Generator

from models.rows import Rows
from tasks.task import Task

DAY, HOUR = 24 * 3600.0, 3600.0  # seconds
TOPIC_ROWS = 40  # neighbours that are a topic, where rows have no documents
RING = 20  # accounts of one hydra
AGENTS = ("OpenAI/Python 3.57.0", "OpenAI/JS 6.2.0", "curl/8.14.1", "python-requests/2.34.2")


@dataclass(frozen=True)
class Ask:
    """One request: when, in seconds since the first day began; which prompt of the pool; and what
    is asked of it."""

    at: float
    prompt: int
    temperature: float = 1.0
    max_tokens: int = 16
    top_logprobs: int = 0


@dataclass(frozen=True)
class Customer:
    """An account and all that it asks. ring: the number of the hydra that it belongs to."""

    kind: str
    tier: str
    address: str
    agent: str
    asks: list[Ask] = field(repr=False)
    ring: int | None = None


@dataclass(frozen=True)
class Pool:
    """Prompts [N], and the topic [N] of each. Prompts of a topic are neighbours, in order."""

    prompts: list[str]
    topics: np.ndarray

    @classmethod
    def of(cls, task: Task, rows: Rows, size: int) -> "Pool":
        rows = rows.take(np.arange(min(size, len(rows))))
        units = task.units(rows.ids[np.arange(len(rows))])
        topics = np.arange(len(rows)) // TOPIC_ROWS if units is None else units
        return cls([task.question(rows, i) for i in range(len(rows))], topics)

    def of_topic(self, topic: int) -> np.ndarray:
        return np.flatnonzero(self.topics == topic)

    def some_topics(self, draw: Generator, count: int) -> np.ndarray:
        known = np.unique(self.topics)
        return draw.choice(known, min(count, len(known)), replace=False)


# -- customers -------------------------------------------------------------------------------------


def chat(pool: Pool, draw: Generator, days: int) -> list[list[Ask]]:
    interests = pool.some_topics(draw, int(draw.integers(2, 6)))
    return [sessions(pool, draw, days, lambda: int(draw.choice(interests)), draw.uniform(0.5, 3))]


def application(pool: Pool, draw: Generator, days: int) -> list[list[Ask]]:
    topics = pool.some_topics(draw, int(draw.integers(1, 5)))
    known = np.concatenate([pool.of_topic(topic) for topic in topics])
    popular = draw.choice(known, min(60, len(known)), replace=False)
    share = 1 / np.arange(1, len(popular) + 1)
    times = in_the_daytime(draw, days, draw.uniform(10, 40))
    prompts = draw.choice(popular, len(times), p=share / share.sum())
    longest = int(draw.choice([8, 16]))
    shown = int(draw.choice([0, 5], p=[0.7, 0.3]))  # some show how sure the model is
    return [[Ask(t, int(p), 0.0, longest, shown) for t, p in zip(times, prompts, strict=True)]]


def batch(pool: Pool, draw: Generator, days: int) -> list[list[Ask]]:
    hour, size = draw.uniform(0, 24) * HOUR, int(draw.integers(30, 100))
    start = int(draw.integers(0, len(pool.prompts)))
    asks = []
    for day in range(days):
        times = day * DAY + hour + np.cumsum(draw.exponential(1.5, size))
        places = (start + day * size + np.arange(size)) % len(pool.prompts)
        asks += [Ask(t, int(p), 0.0) for t, p in zip(times, places, strict=True)]
    return [asks]


def evaluation(pool: Pool, draw: Generator, days: int) -> list[list[Ask]]:
    hour, size = draw.uniform(0, 24) * HOUR, int(draw.integers(30, 80))
    sample = draw.choice(len(pool.prompts), min(size, len(pool.prompts)), replace=False)
    asks = []
    for day in range(0, days, int(draw.integers(1, 3))):
        times = day * DAY + hour + np.cumsum(draw.exponential(1.0, len(sample)))
        asks += [Ask(t, int(p), 0.0, 16, 5) for t, p in zip(times, sample, strict=True)]
    return [asks]


# -- extractors ------------------------------------------------------------------------------------


def naive(pool: Pool, draw: Generator, days: int) -> list[list[Ask]]:
    size = min(len(pool.prompts), int(draw.integers(500, 1200)))
    times = draw.uniform(0, days - 1) * DAY + np.cumsum(draw.exponential(1.1, size))
    return [extraction(draw, draw.permutation(len(pool.prompts))[:size], times)]


def throttled(pool: Pool, draw: Generator, days: int) -> list[list[Ask]]:
    times = in_the_daytime(draw, days, draw.uniform(50, 100))[: len(pool.prompts)]
    return [extraction(draw, draw.permutation(len(pool.prompts))[: len(times)], times)]


def mixed(pool: Pool, draw: Generator, days: int) -> list[list[Ask]]:
    (cover,) = chat(pool, draw, days)
    order = iter(draw.permutation(len(pool.prompts)))
    hidden = [
        Ask(ask.at + draw.exponential(10), int(prompt), ask.temperature, ask.max_tokens)
        for ask, prompt in zip(cover, order, strict=False)
        if draw.random() < 0.6
    ]
    return [sorted(cover + hidden, key=lambda ask: ask.at)]


def hydra(pool: Pool, draw: Generator, days: int) -> list[list[Ask]]:
    parts = np.array_split(draw.permutation(len(pool.prompts)), RING)
    times = [in_the_daytime(draw, days, draw.uniform(8, 20))[: len(part)] for part in parts]
    whole = extraction(draw, np.concatenate(parts), np.zeros(len(pool.prompts)))
    starts = np.cumsum([0, *map(len, parts)])
    return [
        [replace(ask, at=t) for ask, t in zip(whole[start:], at, strict=False)]
        for start, at in zip(starts, times, strict=False)
    ]


def camouflaged(pool: Pool, draw: Generator, days: int) -> list[list[Ask]]:
    topics = iter(draw.permutation(np.unique(pool.topics)).tolist() * 100)
    return [sessions(pool, draw, days, lambda: next(topics), draw.uniform(5, 9))]


def extraction(draw: Generator, prompts: np.ndarray, times: np.ndarray) -> list[Ask]:
    """An answer to every prompt. One extractor asks for what is revealed beside it, another only
    for the text; one samples, another does not."""
    temperature, longest = float(draw.choice([0.0, 0.7, 1.0])), int(draw.choice([16, 24, 32]))
    shown = int(draw.choice([0, 5]))
    return [
        Ask(t, int(p), temperature, longest, shown) for t, p in zip(times, prompts, strict=True)
    ]


# -- how people ask --------------------------------------------------------------------------------


def sessions(
    pool: Pool, draw: Generator, days: int, topic: Callable[[], int], per_day: float
) -> list[Ask]:
    """A few questions at a time, one after the other in a topic, at about the same hours."""
    hour, longest = draw.uniform(7, 22) * HOUR, int(draw.choice([16, 24, 32]))
    temperature, asks = float(draw.choice([0.7, 1.0])), []
    for day in range(days):
        for _ in range(draw.poisson(per_day)):
            places, at = pool.of_topic(topic()), day * DAY + hour + draw.normal(0, 2.5) * HOUR
            size = min(len(places), 1 + draw.geometric(0.2))
            first = int(draw.integers(0, len(places) - size + 1))
            for place in places[first : first + size]:
                asks.append(Ask(max(0.0, at), int(place), temperature, longest))
                at += draw.exponential(45)
    return sorted(asks, key=lambda ask: ask.at)


def in_the_daytime(draw: Generator, days: int, per_day: float) -> np.ndarray:
    """Times at a rate that rises and falls with the hours of the day."""
    count = draw.poisson(per_day * days)
    hours = np.clip(draw.normal(14, 4, count), 0, 23.99)
    return np.sort(draw.integers(0, days, count) * DAY + hours * HOUR)


Profile = Callable[[Pool, Generator, int], list[list[Ask]]]
BENIGN: dict[str, Profile] = {
    "chat": chat, "application": application, "batch": batch, "evaluation": evaluation,
}  # fmt: skip
ATTACKS: dict[str, Profile] = {
    "naive": naive, "throttled": throttled, "mixed": mixed, "hydra": hydra,
    "camouflaged": camouflaged,
}  # fmt: skip
SHARE = {"chat": 0.5, "application": 0.25, "batch": 0.1, "evaluation": 0.15}  # of the customers


def population(pool: Pool, customers: int, extractors: int, days: int, seed: int) -> list[Customer]:
    """Accounts of all kinds, in random order. customers: benign accounts. extractors: accounts of
    each kind of attack, or about as many heads of hydras."""
    draw = np.random.default_rng(seed)
    kinds = [kind for kind, share in SHARE.items() for _ in range(round(share * customers))]
    for kind in ATTACKS:
        kinds += [kind] * (-(-extractors // RING) if kind == "hydra" else extractors)
    found = []
    for number, kind in enumerate(kinds):
        heads = (BENIGN | ATTACKS)[kind](pool, draw, days)
        agent = str(draw.choice(AGENTS))
        for asks in heads:
            shown = any(ask.top_logprobs for ask in asks)
            address = f"10.{draw.integers(256)}.{draw.integers(256)}.{draw.integers(256)}"
            found.append(
                Customer(
                    kind,
                    "top5-bulk" if shown else "text-bulk",
                    address,
                    agent,
                    asks,
                    number if len(heads) > 1 else None,
                )
            )
    return [found[i] for i in draw.permutation(len(found))]
