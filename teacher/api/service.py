"""What the endpoints share: who asks, may they, what is asked of the engine, what is charged."""

import asyncio
import hashlib
import math
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Protocol

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter, SlidingWindowCounterRateLimiter
from torch import Tensor

from teacher.api.defence import Defence
from teacher.api.engine import Delivered, Engine, Job, Score, Step
from teacher.api.errors import ApiError
from teacher.api.requests import Sampling
from teacher.api.store import ACTIVE, Account, Store
from teacher.api.tiers import PER_MILLION
from teacher.watermark import Watermark

KEEP_CONTENTS = 30 * 24 * 3600.0  # seconds
LIMITS = ("requests_per_minute", "tokens_per_minute", "tokens_per_day")  # of a tier
POLICY = "1"  # of what is exposed and logged
NONE = Defence()


class Prompts(Protocol):
    """How text becomes tokens and tokens become text: a task, or a tokenizer."""

    end: int
    vocabulary: int
    longest_row: int
    longest_answer: int

    def chat(self, messages: list[dict[str, str]]) -> list[int]: ...
    def raw(self, text: str) -> list[int]: ...
    def render(self, tokens: list[int]) -> str: ...
    def token_name(self, token: int) -> str: ...


@dataclass(eq=False)
class Answer:
    """An answer as it grows. finish_reason: `stop`, `length`, or None while it grows. text is that
    of the first `read` tokens: later ones are a part of a letter. To render a token takes those
    from `before` on."""

    index: int
    job: Job
    steps: list[Step] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    before: int = 0
    read: int = 0
    finish_reason: str | None = None


class Service:
    """One model behind accounts."""

    def __init__(
        self,
        store: Store,
        engine: Engine,
        prompts: Prompts,
        model: str,
        defence: Defence = NONE,
        created: int = 0,
    ) -> None:
        self.store, self.engine, self.prompts = store, engine, prompts
        self.model, self.defence, self.created = model, defence, created
        memory = MemoryStorage()
        self.requests = MovingWindowRateLimiter(memory)
        self.tokens = SlidingWindowCounterRateLimiter(memory)
        self.random = random.SystemRandom()

    # -- may they ------------------------------------------------------------------------------

    def account(self, authorization: str | None) -> Account:
        """ApiError for a missing, unknown or revoked key, or an account that is not active."""
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise ApiError(401, "missing_api_key", "send your key: Authorization: Bearer KEY")
        account = self.store.account_of(key.strip())
        if account is None:
            raise ApiError(401, "invalid_api_key", "this key is not known, or was replaced")
        if account.status != ACTIVE:
            raise ApiError(
                403, f"account_{account.status}", f"account {account.id} is {account.status}"
            )
        return account

    def statement(self, account: Account) -> dict[str, Any]:
        """What an account may see and ask, at which price, under which terms, and what it owes."""
        tier, terms = account.tier, self.store.terms(account.terms)
        bill = self.store.bill_of(account.id)
        shown = "access", "price_in", "price_out", "k", *LIMITS
        return {
            "object": "account", "id": account.id, "name": account.name, "model": self.model,
            "tier": {"name": account.tier_name} | {key: getattr(tier, key) for key in shown},
            "terms": {key: terms[key] for key in ("version", "text", "allows_distillation")},
            "bill": bill | {"money": bill.pop("cost") / PER_MILLION**2},
        }  # fmt: skip

    def require_rate(self, account: Account, tokens: int) -> None:
        """ApiError with the seconds to wait if a limit per minute is reached."""
        tier, limiters = account.tier, []
        if tier.requests_per_minute:
            item = RateLimitItemPerMinute(tier.requests_per_minute)
            limiters.append((self.requests, item, "requests", 1))
        if tier.tokens_per_minute:
            item = RateLimitItemPerMinute(tier.tokens_per_minute)
            if tokens > tier.tokens_per_minute:
                raise ApiError(
                    400, "request_too_large", f"this request may use {tokens} tokens, more than "
                    f"the {tier.tokens_per_minute} per minute of tier {account.tier_name}; lower "
                    "max_tokens or n", "max_tokens",
                )  # fmt: skip
            limiters.append((self.tokens, item, "tokens", tokens))
        for limiter, item, what, cost in limiters:
            if not limiter.test(item, what, account.id, cost=cost):
                reset = limiter.get_window_stats(item, what, account.id).reset_time
                raise ApiError(
                    429, "rate_limit_exceeded", f"limit of {item.amount} {what} per minute reached",
                    retry_after=max(0.0, reset - self.store.clock()),
                )  # fmt: skip
        for limiter, item, what, cost in limiters:
            limiter.hit(item, what, account.id, cost=cost)

    def require_model(self, name: str) -> None:
        if name != self.model:
            raise ApiError(
                404,
                "model_not_found",
                f"no model {name!r}; this server has {self.model!r}",
                "model",
            )

    def require_exposure(
        self, account: Account, alternatives: int, body: Sampling
    ) -> dict[int, float]:
        """The bias by token. ApiError for what the tier does not reveal or let one ask."""
        most = account.tier.most_alternatives(self.prompts.vocabulary)
        if alternatives > most:
            raise ApiError(
                403, "not_in_tier", f"tier {account.tier_name} reveals at most {most} "
                f"log-probabilities per token, {alternatives} were asked for", "top_logprobs",
            )  # fmt: skip
        if body.logit_bias and not account.tier.logit_bias:
            raise ApiError(
                403, "not_in_tier", f"tier {account.tier_name} has no logit_bias", "logit_bias"
            )
        bias = {}
        for name, value in (body.logit_bias or {}).items():
            if not name.isdecimal() or int(name) >= self.prompts.vocabulary:
                raise ApiError(
                    400, "invalid_token", f"logit_bias: {name!r} is no token id, expected 0 to "
                    f"{self.prompts.vocabulary - 1}", "logit_bias",
                )  # fmt: skip
            bias[int(name)] = value
        return bias

    def room(self, prompt: list[int], asked: int | None) -> int:
        """How many tokens an answer may have. ApiError for a prompt that leaves none."""
        room = self.prompts.longest_row - len(prompt)
        if room < (0 if asked == 0 else 1):
            raise ApiError(
                400, "context_length_exceeded", f"the prompt has {len(prompt)} tokens, this model "
                f"reads {self.prompts.longest_row} with the answer", "messages",
            )  # fmt: skip
        if asked is not None and asked > room:
            raise ApiError(
                400, "context_length_exceeded", f"max_tokens {asked} and a prompt of {len(prompt)} "
                f"tokens exceed the {self.prompts.longest_row} tokens of this model", "max_tokens",
            )  # fmt: skip
        return min(room, self.prompts.longest_answer) if asked is None else asked

    # -- answering -----------------------------------------------------------------------------

    def jobs(
        self,
        body: Sampling,
        prompt: list[int],
        longest: int,
        bias: dict[int, float],
        wants_log_probs: bool,
        watermark: Watermark | None = None,
        canary: int | None = None,
    ) -> list[Job]:
        """One for each of the `n` answers, each with another seed. canary: the seed of the only
        one, if it is one."""
        seed = self.random.getrandbits(62) if body.seed is None else body.seed
        jobs = [
            Job(
                prompt=prompt,
                longest=longest,
                deliver=lambda step: None,
                temperature=self.temperature_of(body),
                top_p=1.0 if body.top_p is None else body.top_p,
                bias=bias,
                seed=(seed + number) % 2**63,
                watermark=watermark,
                wants_log_probs=wants_log_probs,
            )
            for number in range(body.n or 1)
        ]
        if canary is not None:
            jobs[0] = replace(jobs[0], temperature=1.0, top_p=1.0, seed=canary)
        return jobs

    def temperature_of(self, body: Sampling) -> float:
        """That its answers are drawn at, unless they are canaries."""
        if self.defence.temperature is not None:
            return self.defence.temperature
        return 1.0 if body.temperature is None else body.temperature

    async def answers(self, jobs: list[Job], stops: list[str]) -> AsyncIterator[Answer]:
        """Each answer whenever it has grown by a token, and once more when it is complete. Leaving
        the loop early ends the jobs."""
        loop, arrived = asyncio.get_running_loop(), asyncio.Queue()

        def deliver_to(answer: Answer) -> Callable[[Delivered], None]:
            def deliver(step: Delivered) -> None:
                loop.call_soon_threadsafe(arrived.put_nowait, (answer, step))

            return deliver

        found = [Answer(index, job) for index, job in enumerate(jobs)]
        if found[0].job.longest == 0:  # only the prompt is asked for
            for answer in found:
                answer.finish_reason = "length"
                yield answer
            return
        for answer in found:
            answer.job.deliver = deliver_to(answer)
            self.engine.submit(answer.job)
        growing = len(found)
        try:
            while growing:
                answer, step = await arrived.get()
                if isinstance(step, Exception):
                    raise step
                if answer.finish_reason:
                    continue
                if step is None:
                    answer.finish_reason, growing = "length", growing - 1
                else:
                    self.grow(answer, step, stops)
                    growing -= answer.finish_reason is not None
                yield answer
        finally:
            for answer in found:
                answer.job.cancelled = True

    async def scored(self, tokens: list[int], watermark: Watermark | None = None) -> Tensor:
        """The log-probabilities [P - 1, V] of every token of a text but the first."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Tensor] = loop.create_future()

        def deliver(log_probs: Tensor | Exception | None) -> None:
            failed = isinstance(log_probs, Exception)
            done = future.set_exception if failed else future.set_result
            loop.call_soon_threadsafe(done, log_probs)

        self.engine.submit(Score(tokens, deliver, watermark))
        return self.defence.shown(await future)

    def grow(self, answer: Answer, step: Step, stops: list[str]) -> None:
        """One token more; it is over with the end mark, a stop or the longest answer."""
        token, log_probs = step
        shown = None if log_probs is None else self.defence.shown(log_probs)
        answer.steps.append((token, shown))
        answer.tokens.append(token)
        tokens = answer.tokens
        if tokens[-1] == self.prompts.end:
            answer.finish_reason = "stop"
        elif len(tokens) == answer.job.longest:
            answer.finish_reason = "length"
        known = len(answer.text)
        self.render(answer)
        for stop in stops:
            place = answer.text.find(stop, max(0, known - len(stop)))
            if place >= 0:
                answer.text, answer.finish_reason = answer.text[:place], "stop"
                answer.job.cancelled = True

    def render(self, answer: Answer) -> None:
        """Add the text of the tokens that are new, unless they end within a letter."""
        known = self.prompts.render(answer.tokens[answer.before : answer.read])
        longer = self.prompts.render(answer.tokens[answer.before :])
        if longer.endswith("\ufffd") and not answer.finish_reason:
            return
        answer.text += longer[len(known) :]
        answer.before, answer.read = answer.read, len(answer.tokens)


def alternatives_of(log_probs: Tensor, count: int) -> list[tuple[int, float]]:
    """The likeliest tokens of [V] log-probabilities, those that are impossible left out."""
    top = log_probs.topk(min(count, len(log_probs)))
    possible = int((top.values > -math.inf).sum())  # they come last
    return [*zip(top.indices[:possible].tolist(), top.values[:possible].tolist(), strict=True)]


def hashed(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@lru_cache(maxsize=4096)
def simhash(text: str) -> int:
    """63 bits that differ little between similar texts (Charikar 2002), by runs of four letters."""
    votes = [0] * 63
    for start in range(max(1, len(text) - 3)):
        bits = int.from_bytes(hashlib.sha256(text[start : start + 4].encode()).digest()[:8], "big")
        for place in range(63):
            votes[place] += 1 if bits >> place & 1 else -1
    return sum(1 << place for place, vote in enumerate(votes) if vote > 0)


def fields_of(body: Sampling, prompt_text: str) -> dict[str, Any]:
    """What the usage log keeps of a request: no prompt."""
    return {
        "model": body.model, "stream": int(bool(body.stream)),
        "top_p": body.top_p, "n": body.n or 1, "seed": body.seed, "stops": len(body.stops),
        "logit_bias": len(body.logit_bias or {}), "prompt_hash": hashed(prompt_text),
        "simhash": simhash(prompt_text), "policy": POLICY,
    }  # fmt: skip
