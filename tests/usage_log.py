"""A usage log of made-up customers, without a model behind it: only what was asked, and for how
many tokens."""

import json
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from configs.files import write_json
from teacher.api.replay import body_of, in_order
from teacher.api.requests import ChatRequest
from teacher.api.service import fields_of
from teacher.api.store import Store
from teacher.api.traffic import Pool, population


def subjects(topics: int, size: int, seed: int = 0) -> Pool:
    """A pool of prompts, those of a topic about the same things."""
    draw = np.random.Generator(np.random.PCG64(seed))
    words = [
        "".join(draw.choice([*"abcdefghiklmnoprstuw"], draw.integers(3, 8))) for _ in range(900)
    ]
    prompts = []
    for _ in range(topics):
        own = draw.choice(words, 25, replace=False)
        prompts += [" ".join(draw.choice(own, 4)) + " " + draw.choice(words) for _ in range(size)]
    return Pool(prompts, np.repeat(np.arange(topics), size))


def write_usage_log(file: Path, pool: Pool, customers: int, extractors: int, days: int, seed: int):
    """Returns {account: kind}, which is beside the log, too."""
    people = population(pool, customers, extractors, days, seed)
    now, draw = [0.0], np.random.Generator(np.random.PCG64(seed))
    with closing(Store(file, lambda: now[0])) as store:
        store.database.execute("PRAGMA synchronous = OFF")
        store.publish_terms("1", "No training.", "no")
        added = [store.add_account(f"Customer {n}", one.tier) for n, one in enumerate(people)]
        accounts = [store.account_of(key) for _, key in added]
        model = SimpleNamespace(model="m")
        for at, number, ask in in_order(people):
            now[0] = at
            body = ChatRequest(**body_of(model, pool, ask))
            text = json.dumps([message.model_dump(exclude_none=True) for message in body.messages])
            request = store.begin(
                accounts[number], 40, endpoint="/v1/chat/completions", prompt_tokens=8,
                max_tokens=ask.max_tokens, logprobs=int(bool(body.logprobs)),
                top_logprobs=ask.top_logprobs, ip_hash=people[number].address,
                user_agent=people[number].agent, **fields_of(body, text),
            )  # fmt: skip
            used = min(ask.max_tokens, 1 + int(draw.exponential(40)))
            store.finish(request, used, content=(text, "", 1e9))
    kinds = {account: one.kind for (account, _), one in zip(added, people, strict=True)}
    labels = {account: {"kind": kind, "ring": None} for account, kind in kinds.items()}
    write_json(file.with_suffix(".labels.json"), labels)
    return kinds
