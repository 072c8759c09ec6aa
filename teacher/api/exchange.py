"""One request that passed its key, however it came: limits, usage row, answers, bill."""

import asyncio
import hashlib
import hmac
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass

from teacher.api.engine import Job
from teacher.api.errors import ApiError
from teacher.api.requests import Sampling
from teacher.api.service import KEEP_CONTENTS, Answer, Service, fields_of
from teacher.api.store import Account


@dataclass(frozen=True)
class Origin:
    """Where a request comes from, as the log keeps it."""

    endpoint: str
    ip_hash: str
    user_agent: str


def hashed_address(address: str, salt: bytes) -> str:
    return hmac.new(salt, address.encode(), hashlib.sha256).hexdigest()[:16]


class Exchange:
    """asked: how many tokens the answer may have; None for as many as fit. `admit` comes first."""

    def __init__(
        self,
        service: Service,
        origin: Origin,
        account: Account,
        body: Sampling,
        prompt: list[int],
        text: str,
        asked: int | None,
    ) -> None:
        self.service, self.origin, self.account = service, origin, account
        self.body, self.prompt, self.text = body, prompt, text
        self.longest = service.room(prompt, asked)
        self.request_id = ""
        self.jobs: list[Job] = []
        self.found: dict[int, Answer] = {}

    def admit(self, logprobs: bool, alternatives: int) -> None:
        """Reserve what the request may use, and write its usage row. ApiError for what the tier
        does not reveal, a limit or the quota of the day."""
        service, body, tier = self.service, self.body, self.account.tier
        bias = service.require_exposure(self.account, alternatives, body)
        reserved = len(self.prompt) + (body.n or 1) * self.longest
        service.require_model(body.model)
        service.require_rate(self.account, reserved)
        canary = None
        if (body.n or 1) == 1 and self.longest and not body.logit_bias:  # it can be drawn again
            canary = service.defence.canary(self.account.id, self.prompt)
        self.watermark = None
        if canary is None:
            vocabulary = service.prompts.vocabulary
            self.watermark = service.defence.watermark(self.account, self.prompt, vocabulary)
        request_id = service.store.begin(
            self.account,
            reserved,
            **vars(self.origin),
            prompt_tokens=len(self.prompt),
            max_tokens=self.longest,
            logprobs=int(logprobs),
            top_logprobs=alternatives,
            watermark=self.watermark and self.watermark.name,
            canary=int(canary is not None),
            temperature=1.0 if canary else service.temperature_of(body),
            **fields_of(body, self.text),
        )
        if request_id is None:
            raise ApiError(
                429, "insufficient_quota", f"the {tier.tokens_per_day} tokens per day of tier "
                f"{self.account.tier_name} do not hold this request",
            )  # fmt: skip
        self.request_id = request_id
        self.jobs = service.jobs(
            body, self.prompt, self.longest, bias, logprobs, self.watermark,
            canary and canary[0],
        )  # fmt: skip

    async def growing(self) -> AsyncIterator[Answer]:
        """Each answer whenever it has grown. Leaving the loop early ends them all."""
        async with aclosing(self.service.answers(self.jobs, self.body.stops)) as answers:
            async for answer in answers:
                self.found[answer.index] = answer
                yield answer

    async def answers(self, gone: asyncio.Task | None = None) -> list[Answer] | None:
        """All answers; None if the client is gone, which ends them. Closes the usage row."""
        status = "disconnected"
        try:
            async with aclosing(self.growing()) as growing:
                async for _ in growing:
                    if gone and gone.done():
                        return None
            status = "done"
        finally:
            self.finish(status)
        return [self.found[index] for index in sorted(self.found)]

    def finish(self, status: str) -> None:
        """Close the usage row, and charge what was generated; a second call changes nothing."""
        answers = [self.found[index] for index in sorted(self.found)]
        reasons = {answer.finish_reason for answer in answers}
        self.service.store.finish(
            self.request_id,
            sum(len(answer.steps) for answer in answers),
            status,
            finish_reason=reasons.pop() if len(reasons) == 1 else "mixed",
            content=(self.text, "\n".join(answer.text for answer in answers), KEEP_CONTENTS),
        )
