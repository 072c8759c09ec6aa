"""The usage log of an API as sequences of requests, and their features.

Usage features count how much, when and how an account asks. Sequence features describe the order of
its prompts: whether it continues a subject, repeats prompts, or covers all that can be asked.
"""

import json
import sqlite3
from collections import Counter
from contextlib import closing
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
FEWEST = 10  # requests of an account that is scored
QUERY = """
SELECT account, start, prompt_tokens + completion_tokens AS tokens, temperature, max_tokens,
       top_logprobs, user_agent, prompt
FROM usage JOIN contents USING (request_id)
WHERE completion_tokens > 0 AND start >= (SELECT MAX(start) FROM usage) - ?
ORDER BY start, request_id"""


@dataclass(frozen=True)
class Account:
    """The requests of an account, in order: columns [N]. prompts: indices into the log's `prompts`.
    program: the agent and the settings that the account uses most."""

    name: str
    start: np.ndarray  # seconds
    tokens: np.ndarray  # of prompt and answer
    temperature: np.ndarray
    max_tokens: np.ndarray
    top_logprobs: np.ndarray
    prompts: np.ndarray
    program: str = ""

    def __len__(self) -> int:
        return len(self.start)

    @property
    def distinct(self) -> np.ndarray:
        return first_occurrences(self.prompts)

    def first(self, count: int) -> "Account":
        """The account after its first `count` requests."""
        columns = ("start", "tokens", "temperature", "max_tokens", "top_logprobs", "prompts")
        return replace(self, **{name: getattr(self, name)[:count] for name in columns})


@dataclass(frozen=True)
class Log:
    """prompts: the distinct texts that were asked."""

    accounts: list[Account]
    prompts: list[str]

    @property
    def scored(self) -> list[Account]:
        """The accounts with enough requests to be scored."""
        return [account for account in self.accounts if len(account) >= FEWEST]

    @property
    def seconds(self) -> float:
        """From the first request to the last."""
        ends = [(a.start[0], a.start[-1]) for a in self.accounts]
        return max(e for _, e in ends) - min(s for s, _ in ends) if ends else 0.0


def read_log(file: Path, seconds: float = float("inf")) -> Log:
    """The answered requests of a usage log, or those of its last seconds, whose prompts are still
    stored. LabError if the file is no usage log."""
    if not file.is_file():
        raise LabError(f"no {file}; python -m teacher.api serve, or traffic, writes a usage log")
    try:
        with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as database:
            rows = database.execute(QUERY, (seconds,)).fetchall()
    except sqlite3.DatabaseError as error:
        raise LabError(f"{file} is not a usage log ({error})") from None
    places: dict[str, int] = {}
    by_account: dict[str, list[tuple]] = {}
    for account, *row, prompt in rows:
        place = places.setdefault(prompt, len(places))
        by_account.setdefault(account, []).append((*row, place))
    accounts = [account_of(name, found) for name, found in by_account.items()]
    return Log(accounts, [text_of(prompt) for prompt in places])


def account_of(name: str, rows: list[tuple]) -> Account:
    """rows: (start, tokens, temperature, max_tokens, top_logprobs, user_agent, prompt)."""
    start, tokens, temperature, max_tokens, top_logprobs, agents, prompts = zip(*rows, strict=True)
    temperature = [1.0 if value is None else value for value in temperature]
    columns = (agents, temperature, max_tokens, top_logprobs)
    usual = (Counter(column).most_common(1)[0][0] for column in columns)
    return Account(
        name, np.array(start), np.array(tokens), np.array(temperature),
        np.array(max_tokens, float), np.array(top_logprobs), np.array(prompts),
        " ".join(map(str, usual)),
    )  # fmt: skip


def text_of(prompt: str) -> str:
    """A prompt as the log stores it: a text, or the messages of a chat."""
    try:
        return "\n".join(message["content"] for message in json.loads(prompt))
    except (ValueError, TypeError, KeyError, RecursionError):
        return prompt


def first_occurrences(prompts: np.ndarray) -> np.ndarray:
    """Each prompt once, in the order in which they were asked first."""
    _, first = np.unique(prompts, return_index=True)
    return prompts[np.sort(first)]


# -- features --------------------------------------------------------------------------------------


class PromptSpace:
    """Unit vectors of prompts, by their character n-grams (TF-IDF and a truncated SVD), and the
    mean vector of the prompts that it was fitted on."""

    def __init__(self, prompts: list[str], seed: int = 0) -> None:
        counts = HashingVectorizer(analyzer="char_wb", ngram_range=(3, 5), n_features=2**14)
        size = min(DIMENSIONS, len(prompts) - 1)
        self.pipeline: Pipeline = make_pipeline(
            counts, TfidfTransformer(), TruncatedSVD(size, random_state=seed), Normalizer()
        )
        self.mean = self.pipeline.fit_transform(prompts).mean(0)

    def vectors(self, prompts: list[str]) -> np.ndarray:
        """[P, D]."""
        return self.pipeline.transform(prompts)

    def sequence_features(self, prompts: np.ndarray, vectors: np.ndarray) -> dict[str, float]:
        """Of prompts [N], indices into vectors, in the order in which they were asked. Differences
        of mean cosines are scaled so that chance makes them equally large for few and many."""
        path = vectors[first_occurrences(prompts)]
        count, total = len(path), path.sum(0)
        pairs = (total @ total - count) / max(1, count * (count - 1))
        neighbours = float(np.mean(np.sum(path[1:] * path[:-1], axis=1))) if count > 1 else pairs
        everywhere = self.mean @ self.mean
        return {
            "distinct": np.log1p(count),
            "repeated": 1 - count / len(prompts),
            "continuing": (neighbours - pairs) * count**0.5,
            "narrow": (pairs - everywhere) * count**0.5,
            # the squared MMD from all prompts (Gretton et al. 2012, equation 3)
            "distance": (pairs - 2 * float(total @ self.mean) / count + everywhere) * count,
        }


def usage_features(account: Account) -> dict[str, float]:
    gaps = np.diff(account.start)
    hours = len(np.unique(account.start // HOUR))
    return {
        "requests": np.log1p(len(account)),
        "tokens": np.log1p(account.tokens.sum()),
        "per_active_hour": np.log1p(len(account) / hours),
        "active_hours": np.log1p(hours),
        "active_days": len(np.unique(account.start // DAY)),
        "median_gap": np.log10(np.median(gaps) + 0.1) if len(gaps) else 5.0,
        "sampled": float((account.temperature > 0).mean()),
        "max_tokens": float(account.max_tokens.mean()),
        "with_logprobs": float((account.top_logprobs > 0).mean()),
    }


def all_features(
    accounts: list[Account], space: PromptSpace, vectors: np.ndarray
) -> list[list[float]]:
    return [
        [
            *usage_features(one).values(),
            *space.sequence_features(one.prompts, vectors).values(),
        ]
        for one in accounts
    ]


def checkpoints(account: Account) -> list[int]:
    """The numbers of requests after which an account is scored: each 1.4 times the one before, and
    the last."""
    steps = np.unique(np.round(FEWEST * 2 ** (np.arange(40) / 2)).astype(int))
    return [*(int(count) for count in steps if count < len(account)), len(account)]
