"""Play made-up traffic: days of requests in minutes, into a usage log like any other.

A part is really sent, by OpenAI's client over a socket. The rest goes through the same code from
the limits on, without HTTP. Either way the clock of the log is that of the traffic.
"""

import asyncio
import hashlib
import heapq
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from contextvars import ContextVar

import openai
import uvicorn

from teacher.api.app import create_app
from teacher.api.exchange import Exchange, Origin, hashed_address
from teacher.api.requests import ChatRequest
from teacher.api.service import Service
from teacher.api.traffic import Ask, Customer, Pool

AT_ONCE = 256  # requests that are replayed together
SALT = b"traffic"


class Clock:
    """Seconds since the epoch, as the one who asks has it: tasks that run together have each
    another time. The server's side of a socket has the time that was set last."""

    def __init__(self, start: float) -> None:
        self.start, self.latest = start, start
        self.own: ContextVar[float | None] = ContextVar("own", default=None)

    def __call__(self) -> float:
        own = self.own.get()
        return self.latest if own is None else own

    def set(self, seconds: float) -> None:
        """So many seconds after the start."""
        self.latest = self.start + seconds
        self.own.set(self.latest)


Turn = tuple[float, int, Ask]  # when, the number of the customer, what it asks


def in_order(customers: list[Customer]) -> Iterator[Turn]:
    """All requests, by their times."""
    turns = ([(ask.at, number, ask) for ask in one.asks] for number, one in enumerate(customers))
    return heapq.merge(*turns, key=lambda turn: turn[:2])


def is_sent(turn: Turn, share: float) -> bool:
    """Whether a request is really sent: a share of all, the same in every replay."""
    digest = hashlib.sha256(f"{turn[1]} {turn[0]}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < share * 2**32


async def play(
    service: Service,
    clock: Clock,
    customers: list[Customer],
    keys: list[str],
    pool: Pool,
    share_sent: float,
    progress: Callable[[int], None] = lambda requests: None,
) -> None:
    """Answer all requests of customers with these keys."""
    gate = asyncio.Semaphore(AT_ONCE)

    async def replay(turn: Turn) -> None:
        async with gate:
            await replayed(service, clock, customers[turn[1]], keys[turn[1]], pool, turn[2])
            progress(1)

    turns = [*in_order(customers)]
    waiting = [turn for turn in turns if not is_sent(turn, share_sent)]
    for start in range(0, len(waiting), 4 * AT_ONCE):
        await asyncio.gather(*map(replay, waiting[start : start + 4 * AT_ONCE]))
    async with serving(service) as url:
        clients: dict[int, openai.AsyncOpenAI] = {}
        for at, number, ask in (turn for turn in turns if is_sent(turn, share_sent)):
            if number not in clients:
                clients[number] = openai.AsyncOpenAI(
                    api_key=keys[number], base_url=f"{url}/v1", max_retries=0,
                    default_headers={
                        "user-agent": customers[number].agent,
                        "x-forwarded-for": customers[number].address,
                    },
                )  # fmt: skip
            clock.set(at)
            await clients[number].chat.completions.create(**body_of(service, pool, ask))
            progress(1)
        for client in clients.values():
            await client.close()


def body_of(service: Service, pool: Pool, ask: Ask) -> dict:
    """The request as OpenAI's API has it."""
    body = {
        "model": service.model,
        "messages": [{"role": "user", "content": pool.prompts[ask.prompt]}],
        "temperature": ask.temperature,
        "max_tokens": ask.max_tokens,
    }
    if ask.top_logprobs:
        body |= {"logprobs": True, "top_logprobs": ask.top_logprobs}
    return body


async def replayed(
    service: Service, clock: Clock, customer: Customer, key: str, pool: Pool, ask: Ask
) -> None:
    """One request, from the limits on."""
    clock.set(ask.at)
    body = ChatRequest(**body_of(service, pool, ask))
    messages = [message.model_dump(exclude_none=True) for message in body.messages]
    exchange = Exchange(
        service,
        Origin(
            "/v1/chat/completions",
            hashed_address(customer.address, SALT),
            customer.agent,
        ),
        service.account(f"Bearer {key}"),
        body,
        service.prompts.chat(messages),
        json.dumps(messages, ensure_ascii=False),
        body.max_tokens,
    )
    exchange.admit(bool(body.logprobs), ask.top_logprobs)
    await exchange.answers()


@asynccontextmanager
async def serving(service: Service) -> AsyncIterator[str]:
    """The service on a free port, in this event loop."""
    config = uvicorn.Config(
        create_app(service, SALT), host="127.0.0.1", port=0, log_level="error", lifespan="off"
    )
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    await task
