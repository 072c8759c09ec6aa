"""Honest, slow and hostile clients at one server. About 3 minutes on an idle machine, after
`make demo`. Exit code 1 if a limit of this file is exceeded.

    python -m tests.benchmarks.api_load runs/quickstart
    python -m tests.benchmarks.api_load runs/quickstart --requests 100000    # memory, half an hour

200 honest clients ask, alone and beside 10 slow and 10 hostile ones: the 99th percentile of their
waiting time may at most double. Then the log is counted: no request past a key, a limit or a quota.
"""

import argparse
import asyncio
import itertools
import json
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import httpx2
import openai
import psutil

from experiment.run import Run
from tasks import load_task
from teacher.api.store import Store
from teacher.api.tiers import TIERS

ROOT = Path(__file__).parent.parent.parent
HONEST, SLOW, HOSTILE = 200, 10, 10
MOST_SLOWER, MOST_GROWTH = 2.0, 1.1  # of the 99th percentile, of memory
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 999\r\n\r\n"
PAUSE = 1.0  # seconds between two requests of an honest client, on average


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--requests", type=int, default=4_000, help="of the honest clients")
    options = parser.parse_args()
    run = Run.finished(options.run)
    task = load_task(run.config().task)
    rows = task.rows("heldout")
    questions = [task.question(rows, i) for i in range(min(1000, len(rows)))]
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "api.sqlite")
        store.publish_terms("1", "No training.", "no")
        port = free_port()
        command = [sys.executable, "-m", "teacher.api", "--database", f"{folder}/api.sqlite"]
        server = subprocess.Popen(
            [*command, "serve", str(run.folder), "--port", str(port)], cwd=ROOT,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            found = asyncio.run(
                measured(store, port, run.config().name, questions, options.requests, server.pid)
            )
        finally:
            server.terminate()
            server.wait()
        problems = [*found, *past_a_limit(store)]
        store.close()
    for problem in problems:
        print(problem)
    return int(bool(problems))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


async def measured(
    store: Store, port: int, model: str, questions: list[str], requests: int, pid: int
) -> list[str]:
    """What was worse than this file allows."""
    url = f"http://127.0.0.1:{port}"
    keys = [store.add_account(f"Honest {n}", "text-bulk")[1] for n in range(HONEST)]
    await until_it_answers(url)
    await honest(url, keys, model, questions, 2 * HONEST)  # as a server that has been running
    memory = psutil.Process(pid).memory_info().rss
    alone = await honest(url, keys, model, questions, requests // 2)
    others = [asyncio.create_task(slow(port)) for _ in range(SLOW)]
    for number in range(HOSTILE):
        key = store.add_account(f"Hostile {number}", "text")[1]
        others.append(asyncio.create_task(hostile(url, key, model, number)))
    beside = await honest(url, keys, model, questions, requests // 2)
    for other in others:
        other.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    found, growth = [], psutil.Process(pid).memory_info().rss / memory
    first, second = (statistics.quantiles(times, n=100) for times in (alone, beside))
    print(f"alone:  median {1000 * first[49]:.0f} ms, 99th percentile {1000 * first[98]:.0f} ms")
    print(f"beside: median {1000 * second[49]:.0f} ms, 99th percentile {1000 * second[98]:.0f} ms")
    print(f"memory: {growth:.2f} of what it was, after {requests} requests")
    if second[98] > MOST_SLOWER * first[98]:
        found.append(f"the 99th percentile is {second[98] / first[98]:.1f} times as long")
    if growth > MOST_GROWTH:
        found.append(f"memory has grown to {growth:.2f} of what it was")
    return found


async def until_it_answers(url: str) -> None:
    async with httpx2.AsyncClient() as client:
        while True:
            try:
                await client.get(url)
                return
            except httpx2.HTTPError:
                await asyncio.sleep(0.1)


async def honest(
    url: str, keys: list[str], model: str, questions: list[str], requests: int
) -> list[float]:
    """The seconds that each request took; every client waits a little between two of them."""
    times: list[float] = []
    left = itertools.count()

    async def one(number: int, key: str) -> None:
        draw = random.Random(number)
        client = openai.AsyncOpenAI(api_key=key, base_url=f"{url}/v1", max_retries=0)
        while next(left) < requests:
            await asyncio.sleep(draw.expovariate(1 / PAUSE))
            started = time.perf_counter()
            messages = [{"role": "user", "content": draw.choice(questions)}]
            await client.chat.completions.create(model=model, messages=messages, temperature=0)
            times.append(time.perf_counter() - started)
        await client.close()

    await asyncio.gather(*(one(number, key) for number, key in enumerate(keys)))
    return times


async def slow(port: int) -> None:
    """Sends a byte of its request a second."""
    while True:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        with suppress(OSError):  # the server gives up on it
            for byte in HEAD:
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(1)
        writer.close()


async def hostile(url: str, key: str, model: str, number: int) -> None:
    """Whatever it should not do, as fast as it can."""
    large = {"model": model, "messages": [{"role": "user", "content": "a"}], "n": 64}
    bodies = [
        b"{" * 50_000, b"\xff\xfe", b"a" * 999_999, json.dumps(large).encode(),
        json.dumps({**large, "n": 1, "stream": True}).encode(),
        json.dumps({**large, "top_logprobs": 20, "logprobs": True}).encode(),
    ]  # fmt: skip
    headers = [{"authorization": f"Bearer {key}"}, {"authorization": "Bearer sk-lab-guess"}, {}]
    draw = random.Random(number)
    async with httpx2.AsyncClient(timeout=30) as client:
        while True:
            try:
                path = draw.choice(["/v1/chat/completions", "/v1/completions"])
                await client.post(
                    url + path, content=draw.choice(bodies), headers=draw.choice(headers)
                )
            except httpx2.HTTPError:
                await asyncio.sleep(0.01)


def past_a_limit(store: Store) -> list[str]:
    """Accounts with more requests in a minute, or tokens in a day, than their tier allows; and rows
    of no account, or that were never closed."""
    found = []
    for row in store.accounts():
        tier, usage = TIERS[row["tier"]], store.usage_of(row["id"])
        times = [one["start"] for one in usage]
        used = [one["prompt_tokens"] + (one["completion_tokens"] or 0) for one in usage]
        most = max((sum(t - 60 < s <= t for s in times) for t in times), default=0)
        if tier.requests_per_minute and most > tier.requests_per_minute:
            found.append(f"{row['name']}: {most} requests in a minute")
        if tier.tokens_per_day and sum(used) > tier.tokens_per_day:
            found.append(f"{row['name']}: {sum(used)} tokens in a day")
    loose = store.database.execute(
        "SELECT COUNT(*) FROM usage WHERE status = 'running' OR account NOT IN "
        "(SELECT id FROM accounts)"
    ).fetchone()[0]
    return found + ([f"{loose} rows are loose"] if loose else [])


if __name__ == "__main__":
    sys.exit(main())
