"""An endpoint of OpenAI's API as a source of outputs: what anybody with a key can collect.

Many requests are in flight. Every answer is in a journal before it is used, so that a run that was
killed asks and pays for none of them again. A budget is reserved before a request is sent, and what
the answer did not use is given back, so that it is never exceeded.
"""

import json
import math
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from openai import (
    APIConnectionError,
    APIStatusError,
    DefaultHttpxClient,
    OpenAI,
    RateLimitError,
)
from safetensors.numpy import load, save

from configs.schema import Api, LabError
from models.rows import Rows, row_id
from tasks.task import Task
from teacher.access import ACCESS
from teacher.api.tiers import PER_MILLION
from teacher.signal import LOG_ZERO
from teacher.source import TeacherRow

RETRIES = 5  # of a request that fails for reasons of the network or the server
PATIENCE = 600.0  # seconds for one answer
OVERHEAD = 64  # tokens that a server's chat template may add to a prompt
WAIT = 10.0  # seconds before the next try after a rate limit that does not say how many
PROBE = -1  # in the journal, the answer that shows what an endpoint reveals
ROUNDING = 1e-3  # of the sum of all probabilities
MOST_UNREADABLE = 0.1  # of the answers


@dataclass(frozen=True)
class Offer:
    """What an endpoint sells to a key, and on which terms. access and k: what it reveals; None if
    it does not say."""

    url: str
    model: str
    key: str
    price_in: float  # per million tokens
    price_out: float
    access: str | None = None
    k: int = 0
    terms: str = "unknown"  # their version
    terms_text: str = ""
    allows_distillation: str = "unknown"

    @classmethod
    def of(cls, url: str, model: str, key: str, settings: Api) -> "Offer":
        """As the server states it (`/v1/account`, which most do not have) or else as the config
        does. LabError if it cannot be reached or does not know the key."""
        try:
            with client_of(url, key) as client:
                found = client.get("/account", cast_to=object)
            tier, terms = found["tier"], found["terms"]
        except (APIStatusError, APIConnectionError, TypeError, KeyError, ValueError) as error:
            states_it = getattr(error, "status_code", None) not in (404, 405)
            if states_it and isinstance(error, APIStatusError | APIConnectionError):
                raise problem(url, error) from None
            return cls(
                url, model, key, settings.price_in, settings.price_out,
                allows_distillation=settings.allows_distillation,
            )  # fmt: skip
        return cls(
            url, model, key, tier["price_in"], tier["price_out"], tier["access"], tier["k"],
            terms["version"], terms["text"], terms["allows_distillation"],
        )  # fmt: skip

    def money(self, prompt_tokens: int, completion_tokens: int) -> float:
        return (self.price_in * prompt_tokens + self.price_out * completion_tokens) / PER_MILLION


def client_of(url: str, key: str) -> OpenAI:
    """OpenAI's client; to this machine it goes straight, whatever proxy the environment names."""
    local = urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")
    return OpenAI(
        base_url=url, api_key=key, max_retries=RETRIES, timeout=PATIENCE,
        http_client=DefaultHttpxClient(trust_env=not local),
    )  # fmt: skip


def problem(url: str, error: APIStatusError | APIConnectionError) -> LabError:
    """One line about a request that will not pass."""
    if isinstance(error, APIStatusError):
        return LabError(f"{url}: {error.message}")
    return LabError(f"{url} does not answer ({error.__cause__})")


class Journal:
    """The answers that were paid for, in a SQLite file: by row id, what the endpoint returned."""

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self.database = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
        self.database.execute("PRAGMA journal_mode = WAL")
        self.database.execute("PRAGMA synchronous = NORMAL")
        self.database.execute(
            "CREATE TABLE IF NOT EXISTS answers (id INTEGER PRIMARY KEY, prompt_tokens INTEGER, "
            "completion_tokens INTEGER, content BLOB)"
        )
        self.lock = threading.Lock()

    def add(self, row: int, usage: tuple[int, int], answer: "Answer") -> None:
        with self.lock:
            self.database.execute(
                "INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?)", (row, *usage, answer.packed())
            )

    def get(self, row: int) -> "Answer | None":
        with self.lock:
            found = self.database.execute(
                "SELECT content FROM answers WHERE id = ?", (row,)
            ).fetchone()
        return Answer.unpacked(found[0]) if found else None

    def totals(self) -> tuple[int, int, int]:
        """Requests, prompt tokens and completion tokens."""
        with self.lock:
            return self.database.execute(
                "SELECT COUNT(*), COALESCE(SUM(prompt_tokens), 0), "
                "COALESCE(SUM(completion_tokens), 0) FROM answers"
            ).fetchone()


@dataclass(frozen=True)
class Answer:
    """An answer of n tokens of the student, and m log-probabilities that were revealed at each:
    tokens [n]; log_probs [n, m] of the outcomes in indices [n, m]. m is 0 for text alone; n is 0
    for an answer that the task cannot read."""

    tokens: np.ndarray
    indices: np.ndarray
    log_probs: np.ndarray

    @classmethod
    def of(cls, tokens: list[int], revealed: list[dict[int, float]]) -> "Answer":
        """revealed: {outcome: log-probability} at each token; where there are fewer than elsewhere,
        the first is repeated."""
        most = max(map(len, revealed), default=0)
        padded = [[*pairs.items()] for pairs in revealed]
        padded = [pairs + pairs[:1] * (most - len(pairs)) for pairs in padded]
        found = np.array(padded, np.float64).reshape(len(tokens), most, 2)
        return cls(
            np.array(tokens, np.int64),
            found[..., 0].astype(np.int32),
            found[..., 1].astype(np.float32),
        )

    def packed(self) -> bytes:
        return save(vars(self))

    @classmethod
    def unpacked(cls, content: bytes) -> "Answer":
        return cls(**load(content))

    def distribution(self, count: int, vocabulary: int) -> torch.Tensor:
        """Log-probabilities [count, V] at the first tokens. What was not revealed shares the rest
        evenly: with the k largest revealed, nobody sees how."""
        indices, log_probs = (
            torch.from_numpy(values[:count].copy()) for values in (self.indices, self.log_probs)
        )
        known = torch.zeros((count, vocabulary), dtype=torch.bool)
        known.scatter_(-1, indices.long(), True)
        dense = torch.zeros((count, vocabulary), dtype=torch.float64)
        dense.scatter_(-1, indices.long(), log_probs.double().exp())
        rest = (1 - dense.sum(-1)).clamp_min(0) / (~known).sum(-1).clamp_min(1)
        shared = torch.where(known, dense, rest[:, None])
        return shared.log().clamp_min(LOG_ZERO).float()


def mass_of(log_probs: dict[str, float]) -> float:
    """The probability of these outcomes together. Outcomes that are impossible may be missing."""
    return sum(map(math.exp, log_probs.values()))


@dataclass
class Spending:
    """What has been spent, and what requests in flight may spend, of a budget in tokens and in
    money; None is unlimited."""

    offer: Offer
    most_tokens: int | None
    most_money: float | None
    requests: int
    prompt_tokens: int
    completion_tokens: int
    overhead: int = OVERHEAD
    reserved: dict[int, tuple[int, int]] = field(default_factory=dict)

    @property
    def money(self) -> float:
        return self.offer.money(self.prompt_tokens, self.completion_tokens)

    def reserve(self, row: int, prompt: int, longest: int) -> bool:
        """Whether the budget holds one more request: a prompt of this many bytes, which has no more
        tokens, and an answer of this many tokens."""
        asked = [*self.reserved.values(), (prompt, longest)]
        tokens_in = self.prompt_tokens + sum(size + self.overhead for size, _ in asked)
        tokens_out = self.completion_tokens + sum(size for _, size in asked)
        money = self.offer.money(tokens_in, tokens_out)
        if self.most_tokens is not None and tokens_in + tokens_out > self.most_tokens:
            return False
        if self.most_money is not None and money > self.most_money:
            return False
        self.reserved[row] = (prompt, longest)
        return True

    def settle(self, row: int, prompt_tokens: int, completion_tokens: int) -> None:
        """An answer has arrived: what it used instead of what was reserved."""
        prompt, _ = self.reserved.pop(row)
        self.requests += 1
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens
        self.overhead = max(self.overhead, prompt_tokens - prompt)


class Endpoint:
    """Answers prompts by asking an endpoint. access: what of its distributions is asked for; k: how
    many log-probabilities with access top_k. seed: of the answers, where the endpoint honours one.
    """

    flops = 0.0  # of this machine

    def __init__(
        self,
        task: Task,
        offer: Offer,
        settings: Api,
        access: str,
        k: int | None,
        journal: Journal,
        seed: int,
    ) -> None:
        self.task, self.offer, self.settings = task, offer, settings
        # how many log-probabilities to ask for at each token
        self.alternatives = ACCESS[access].sold(k, task.vocabulary)
        self.journal, self.seed = journal, seed
        self.client = client_of(offer.url, offer.key)
        self.spending = Spending(
            offer, settings.budget_tokens, settings.budget_money, *journal.totals()
        )
        self.asked = self.unreadable = 0
        self.stopped = threading.Event()

    def close(self) -> None:
        self.client.close()
        self.journal.database.close()

    def origin(self) -> dict[str, Any]:
        """Whose answers they are, and on which terms they were bought."""
        return {
            "url": self.settings.url,
            "model": self.offer.model,
            "terms": self.offer.terms,
            "allows_distillation": self.offer.allows_distillation,
            "permission": self.settings.permission,
        }

    def bill(self) -> dict[str, Any]:
        """The money is what the endpoint charges, not the time of this machine."""
        spent = self.spending
        return {
            "money": spent.money,
            "requests": spent.requests,
            "prompt_tokens": spent.prompt_tokens,
            "completion_tokens": spent.completion_tokens,
        }

    def answer(
        self, rows: Rows, temperature: float, probabilities: bool, generator: torch.Generator
    ) -> Iterator[TeacherRow]:
        """Answer the prompts of some rows: those in the journal first, then the others as the
        answers arrive, but for those that the task cannot read. LabError if the endpoint refuses,
        or if the budget is spent; what was answered is kept."""
        waiting: deque[int] = deque()
        for i in range(len(rows)):
            known = self.journal.get(int(rows.ids[i]))
            if known is None:
                waiting.append(i)
            else:
                yield from self.read_row(rows, i, known)
        pool, asked = ThreadPoolExecutor(self.settings.at_once), {}
        try:
            while waiting or asked:
                while waiting and len(asked) < self.settings.at_once:
                    i = waiting[0]
                    question = self.task.question(rows, i)
                    longest = self.longest(question)
                    if not self.spending.reserve(i, len(question.encode()), longest):
                        break
                    row = int(rows.ids[waiting.popleft()])
                    asked[pool.submit(self.ask, row, question, longest, temperature)] = i
                if not asked:
                    raise self.budget_spent(len(waiting), len(rows))
                for future in wait(asked, return_when=FIRST_COMPLETED).done:
                    i = asked.pop(future)
                    answer, used = future.result()
                    self.spending.settle(i, *used)
                    yield from self.read_row(rows, i, answer)
        finally:
            if waiting or asked:  # an error: nobody waits for a rate limit any more
                self.stopped.set()
            pool.shutdown(cancel_futures=True)  # answers in flight are paid for: into the journal
            self.stopped.clear()

    def budget_spent(self, left: int, rows: int) -> LabError:
        return LabError(
            f"the budget of {self.offer.url} is spent, with {left} of {rows} rows not answered; "
            "raise teacher.api.budget_tokens or budget_money, or lower outputs.transfer_rows"
        )

    def longest(self, question: str) -> int:
        """How many tokens an answer may have."""
        room = self.task.longest_row - len(self.task.prompt(question))
        return max(1, min(self.task.longest_answer, room))

    def read_row(self, rows: Rows, i: int, answer: Answer) -> Iterator[TeacherRow]:
        """The row of an answer; none if the task cannot read it. LabError if there are many."""
        self.asked += 1
        if not len(answer.tokens):
            self.unreadable += 1
            if self.unreadable > max(10, MOST_UNREADABLE * self.asked):
                raise LabError(
                    f"task {self.task.name} cannot read {self.unreadable} of the answers of "
                    f"{self.offer.model}; is it a model for this task?"
                )
            return
        length = int(rows.prompt_lengths[i])
        count = min(len(answer.tokens), self.task.longest_row - length)
        tokens = np.concatenate([rows.prompt(i), answer.tokens[:count]])
        log_probs = None
        if self.alternatives:
            log_probs = answer.distribution(count, self.task.vocabulary)
        yield TeacherRow(i, int(rows.ids[i]), tokens, length, log_probs)

    def require_revealed(self, question: str) -> None:
        """LabError if the endpoint does not reveal what is to be learned from: as it states or, if
        it does not, as an answer of one token shows."""
        if not self.alternatives:
            return
        if self.offer.access is None:
            known = self.journal.get(PROBE)
            if known is None or not len(known.tokens):
                if not self.spending.reserve(PROBE, len(question.encode()), 1):
                    raise self.budget_spent(1, 1)
                self.spending.settle(PROBE, *self.ask(PROBE, question, 1, 0.0)[1])
            return
        most = ACCESS[self.offer.access].sold(self.offer.k, self.task.vocabulary)
        if most < self.alternatives:
            raise LabError(
                f"this key of {self.offer.url} is shown at most {most} log-probabilities per "
                f"token, and the recipe learns from {self.alternatives}"
            )

    # -- one request ---------------------------------------------------------------------------

    def ask(
        self, row: int, question: str, longest: int, temperature: float
    ) -> tuple[Answer, tuple[int, int]]:
        """(the answer, the tokens of prompt and answer that were charged), in the journal."""
        asked = {
            "model": self.offer.model,
            "max_tokens": longest,
            "temperature": temperature,
            "seed": row_id(f"{self.seed} {row}") % 2**31,
        }
        body = self.patiently(partial(self.send, question, asked))
        used = len(question.encode()) + self.spending.overhead, longest  # if it does not say
        try:
            found = json.loads(body)
            usage = found.get("usage") or {}
            used = usage.get("prompt_tokens", used[0]), usage.get("completion_tokens", used[1])
            answer = self.read(found["choices"][0])
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            answer = Answer.of([], [])  # paid, whatever it is
        except LabError:
            self.journal.add(row, used, Answer.of([], []))
            raise
        self.journal.add(row, used, answer)
        return answer, used

    def send(self, question: str, asked: dict[str, Any]) -> bytes:
        """The body of the response; the client's own types would take longer to build than the
        answer to write."""
        count = self.alternatives
        if self.settings.endpoint == "completions":
            more = {"logprobs": count} if count else {}
            api = self.client.completions.with_raw_response
            return api.create(prompt=question, **asked, **more).content
        more = {"logprobs": True, "top_logprobs": count} if count else {}
        api = self.client.chat.completions.with_raw_response
        messages = [{"role": "user", "content": question}]
        return api.create(messages=messages, **asked, **more).content

    def patiently(self, send: Callable[[], bytes]) -> bytes:
        """Again after a rate limit, for as long as it takes; the client itself tries again after
        errors of the network or the server. LabError for what will not pass."""
        while True:
            try:
                return send()
            except RateLimitError as error:
                headers = error.response.headers
                if error.code == "insufficient_quota" or headers.get("x-should-retry") == "false":
                    raise problem(self.offer.url, error) from None
                self.pause(headers.get("retry-after", ""))
            except (APIStatusError, APIConnectionError) as error:
                raise problem(self.offer.url, error) from None

    def pause(self, retry_after: str) -> None:
        """Wait as long as the server says; LabError if the others have failed meanwhile."""
        seconds = float(retry_after) if retry_after.isdecimal() else WAIT
        if self.stopped.wait(seconds):
            raise LabError(f"{self.offer.url} was being waited for")

    # -- reading an answer ---------------------------------------------------------------------

    @cached_property
    def ids(self) -> dict[str, int]:
        """{what the endpoint calls a token: its id here}."""
        return {self.task.token_name(token): token for token in range(self.task.vocabulary)}

    def read(self, choice: dict[str, Any]) -> Answer:
        """An answer in the student's tokens; without tokens if the task cannot read it."""
        ended, end = choice["finish_reason"] == "stop", self.task.end
        if not self.alternatives:
            text = choice["text"] if "text" in choice else choice["message"]["content"]
            try:
                tokens = self.task.encode_answer(text)
            except LabError:
                return Answer.of([], [])
            tokens += [end] if ended else []
            return Answer.of(tokens, [{} for _ in tokens])
        names, revealed = self.revealed(choice)
        tokens = [self.ids[name] for name in names]
        pairs = [{self.ids[name]: value for name, value in one.items()} for one in revealed]
        if ended and end not in tokens[-1:]:  # some endpoints do not show the end mark
            tokens.append(end)
            pairs.append({end: 0.0})
        return Answer.of(tokens, pairs)

    def revealed(self, choice: dict[str, Any]) -> tuple[list[str], list[dict[str, float]]]:
        """The names of an answer's tokens, and at each of them {name: log-probability}. LabError
        for an answer without, or in other tokens than the student's."""
        found = choice.get("logprobs") or {}
        if "content" in found:
            names = [one["token"] for one in found["content"]]
            pairs = [
                {other["token"]: other["logprob"] for other in one["top_logprobs"]}
                for one in found["content"]
            ]
        else:
            names, pairs = found.get("tokens") or [], found.get("top_logprobs") or []
        fewest = min(map(len, pairs), default=0)
        if not names or not fewest:
            raise LabError(
                f"{self.offer.url} reveals no log-probabilities of {self.offer.model}: use access "
                "text"
            )
        foreign = next((n for n in (*names, *(n for p in pairs for n in p)) if n not in self.ids),
                       None)  # fmt: skip
        if foreign is not None:
            raise LabError(
                f"{self.offer.model} has other tokens than its student, such as {foreign!r}: use "
                "access text, or a task with its tokenizer"
            )
        if fewest < self.alternatives and any(mass_of(one) < 1 - ROUNDING for one in pairs):
            raise LabError(
                f"{self.offer.url} reveals {fewest} log-probabilities per token, and the recipe "
                f"learns from {self.alternatives}: use access top_k with a smaller outputs.k"
            )
        return names, pairs
