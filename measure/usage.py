"""What accounts have asked an API, read from its usage log, and described in numbers.

A description counts how much, when and how an account asks, and how it walks through what can be
asked: whether it goes on with a subject, comes back to it, or covers everything there is.
"""

import json
import sqlite3
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import Normalizer

from configs.schema import LabError

HOUR, DAY = 3600.0, 24 * 3600.0
DIMENSIONS = 256  # of a prompt's vector
FEWEST = 10  # requests of an account that is judged
QUERY = """
SELECT account, start, prompt_tokens + completion_tokens AS tokens, temperature, max_tokens,
       top_logprobs, ip_hash, user_agent, prompt
FROM usage JOIN contents USING (request_id)
WHERE status = 'done' AND start >= ? ORDER BY start, request_id"""


@dataclass(frozen=True)
class Account:
    """The requests of an account, in order: columns [N]. prompts: places in the log's `prompts`.
    signature: what accounts of one program have in common."""

    name: str
    start: np.ndarray  # seconds
    tokens: np.ndarray  # of prompt and answer
    temperature: np.ndarray
    longest: np.ndarray  # tokens that an answer may have
    shown: np.ndarray  # log-probabilities beside each token
    prompts: np.ndarray
    signature: str = ""

    def __len__(self) -> int:
        return len(self.start)

    @property
    def distinct(self) -> np.ndarray:
        return in_order(self.prompts)

    def first(self, count: int) -> "Account":
        """As it was after so many requests."""
        columns = ("start", "tokens", "temperature", "longest", "shown", "prompts")
        return replace(self, **{name: getattr(self, name)[:count] for name in columns})


@dataclass(frozen=True)
class Log:
    """prompts: every text that was asked, once."""

    accounts: list[Account]
    prompts: list[str]


def read_log(file: Path, since: float = 0.0) -> Log:
    """The requests of a usage log whose prompts are still kept. LabError if there is none."""
    if not file.is_file():
        raise LabError(f"no {file}; python -m teacher.api serve, or traffic, writes a usage log")
    with sqlite3.connect(f"file:{file}?mode=ro", uri=True) as database:
        try:
            rows = database.execute(QUERY, (since,)).fetchall()
        except sqlite3.DatabaseError as error:
            raise LabError(f"{file} is not a usage log ({error})") from None
        finally:
            database.commit()
    database.close()
    places: dict[str, int] = {}
    by_account: dict[str, list[tuple]] = {}
    for account, *row, prompt in rows:
        place = places.setdefault(prompt, len(places))
        by_account.setdefault(account, []).append((*row, place))
    accounts = [account_of(name, found) for name, found in by_account.items()]
    return Log(accounts, [text_of(prompt) for prompt in places])


def account_of(name: str, rows: list[tuple]) -> Account:
    """rows: (start, tokens, temperature, max_tokens, top_logprobs, ip_hash, user_agent, place)."""
    start, tokens, temperature, longest, shown, _, agents, prompts = zip(*rows, strict=True)
    temperature = [1.0 if value is None else value for value in temperature]
    usual = (
        Counter(column).most_common(1)[0][0] for column in (agents, temperature, longest, shown)
    )
    return Account(
        name, np.array(start), np.array(tokens), np.array(temperature), np.array(longest, float),
        np.array(shown), np.array(prompts), " ".join(map(str, usual)),
    )  # fmt: skip


def text_of(prompt: str) -> str:
    """A prompt as the log keeps it: a text, or the messages of a chat."""
    try:
        return "\n".join(message["content"] for message in json.loads(prompt))
    except (ValueError, TypeError, KeyError):
        return prompt


def in_order(prompts: np.ndarray) -> np.ndarray:
    """Each prompt once, where it was asked first."""
    _, first = np.unique(prompts, return_index=True)
    return prompts[np.sort(first)]


# -- describing ------------------------------------------------------------------------------------


class Map:
    """What can be asked, as customers ask it: unit vectors of prompts, by the letters that they
    have in common, and their mean."""

    def __init__(self, prompts: list[str], seed: int = 0) -> None:
        counts = HashingVectorizer(analyzer="char_wb", ngram_range=(3, 5), n_features=2**14)
        size = min(DIMENSIONS, len(prompts) - 1)
        self.pipeline: Pipeline = make_pipeline(
            counts, TfidfTransformer(), TruncatedSVD(size, random_state=seed), Normalizer()
        )
        self.vectors = self.pipeline.fit_transform(prompts)  # [P, D]
        self.mean = self.vectors.mean(0)

    def of(self, prompts: list[str]) -> np.ndarray:
        """Vectors [P, D] of other prompts."""
        return self.pipeline.transform(prompts)

    def walk(self, prompts: np.ndarray, vectors: np.ndarray) -> dict[str, float]:
        """How somebody walks through it who asks these prompts [N] in this order. Differences of
        mean cosines are multiplied so that chance makes them equally large for few and many."""
        path = vectors[in_order(prompts)]
        count, total = len(path), path.sum(0)
        pairs = (total @ total - count) / max(1, count * (count - 1))
        onward = float(np.mean(np.sum(path[1:] * path[:-1], axis=1))) if count > 1 else pairs
        level = self.mean @ self.mean
        return {
            "distinct": np.log1p(count),
            "repeated": 1 - count / len(prompts),
            "onward": (onward - pairs) * count**0.5,  # it goes on with a subject
            "narrow": (pairs - level) * count**0.5,  # few subjects
            # its distance from what all customers ask (MMD, Gretton et al. 2012, eq. 3)
            "apart": (pairs - 2 * float(total @ self.mean) / count + level) * count,
        }


def manner(account: Account) -> dict[str, float]:
    """How much, when and how an account asks."""
    gaps = np.diff(account.start)
    hours = len(np.unique(account.start // HOUR))
    return {
        "requests": np.log1p(len(account)),
        "tokens": np.log1p(account.tokens.sum()),
        "per hour": np.log1p(len(account) / hours),
        "hours": np.log1p(hours),
        "days": len(np.unique(account.start // DAY)),
        "gap": np.log10(np.median(gaps) + 0.1) if len(gaps) else 5.0,
        "sampled": float((account.temperature > 0).mean()),
        "longest": float(account.longest.mean()),
        "shown": float((account.shown > 0).mean()),
    }


def described(log: Log, known: Map) -> dict[str, list[float]]:
    """{account: all that describes it}, of those with enough requests."""
    vectors = known.of(log.prompts)
    return {
        one.name: [*manner(one).values(), *known.walk(one.prompts, vectors).values()]
        for one in log.accounts
        if len(one) >= FEWEST
    }


def checkpoints(account: Account) -> list[int]:
    """After how many requests an account is judged: about each time that it has asked 1.4 times as
    many, and at last."""
    steps = np.unique(np.round(FEWEST * 2 ** (np.arange(40) / 2)).astype(int))
    return [*(int(count) for count in steps if count < len(account)), len(account)]
