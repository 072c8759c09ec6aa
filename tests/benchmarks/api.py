"""What continuous batching gives, in ratios of one run. About 2 minutes on an idle machine, after
`make demo`. Exit code 1 if a ratio is below its limit.

    python -m tests.benchmarks.api runs/quickstart

Engine: the answers to held-out rows, asked at once, against `generate` on the same rows. Server:
requests per second and the time to the first token, by OpenAI's client over a socket, many at a
time and one at a time; ours, and transformers' own (`transformers serve`) with the same model.
"""

import asyncio
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import openai
import torch
from torch import nn

from experiment.experiment import open_model
from experiment.run import Run
from models.generate import answers_of
from models.rows import Rows
from tasks import load_task
from tasks.task import Task
from teacher.api.engine import Engine, Job
from teacher.api.store import Store

ROOT = Path(__file__).parent.parent.parent
LEAST = {"engine / generate": 0.8}
ROUNDS, ROWS = 5, 2048
ASKED, AT_ONCE, ALONE = 400, 64, 50
LONGEST = 16  # tokens of an answer


def main() -> int:
    torch.set_num_threads(1)
    run = Run.finished(sys.argv[1])
    task, model = load_task(run.config().task), open_model(run, "teacher")
    rows = task.rows("heldout")
    rows = rows.take(np.arange(min(ROWS, len(rows))))
    seconds: dict[str, list[float]] = {"generate": [], "engine": []}
    engine = Engine(model, task, most_rows=512)
    together(engine, task, rows)  # as a server that has been running
    for _ in range(ROUNDS):
        seconds["generate"].append(timed(lambda: [*answers(model, task, rows)]))
        seconds["engine"].append(timed(lambda: together(engine, task, rows)))
    engine.close()
    found = {
        "engine / generate": statistics.median(seconds["generate"])
        / statistics.median(seconds["engine"])
    }
    for name, ratio in found.items():
        print(f"{name}: {ratio:.2f} of the rows per second (at least {LEAST[name]:g})")
    prompts = [" ".join(task.tokens[t] for t in rows.prompt(i)[1:]) for i in range(ASKED)]
    port, asked = free_port(), {"many at a time": (ASKED, AT_ONCE), "one at a time": (ALONE, 1)}
    speeds: dict[str, list[float]] = {}
    for name, (command, model) in servers(run, port).items():
        with started(command) as key:
            for how, (count, at_once) in asked.items():
                per_second, first = asyncio.run(ask(port, key, model, prompts[:count], at_once))
                speeds.setdefault(how, []).append(per_second)
                print(
                    f"{name}, {how}: {per_second:.0f} requests per second, first token after "
                    f"{1000 * first:.0f} ms"
                )
    for how, (ours, theirs) in speeds.items():
        print(
            f"ours / transformers serve, {how}: {ours / theirs:.1f} times the requests per second"
        )
    return int(any(ratio < LEAST[name] for name, ratio in found.items()))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def timed(work: object) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def answers(model: nn.Module, task: Task, rows: Rows) -> object:
    return answers_of(
        model, rows, longest=task.longest_answer, end=task.end, vocabulary=task.vocabulary
    )


def together(engine: Engine, task: Task, rows: Rows) -> None:
    """All rows, asked at once."""
    left, over = [len(rows)], threading.Event()

    def deliver(step: object) -> None:
        if step is None:
            left[0] -= 1
            if not left[0]:
                over.set()

    for i in range(len(rows)):
        prompt = rows.prompt(i).tolist()
        engine.submit(Job(prompt, task.longest_answer, deliver, temperature=0.0))
    over.wait()


def servers(run: Run, port: int) -> dict[str, tuple[list[str], str]]:
    """{name: (its command, the model's name there)} of ours and of transformers' own."""
    ours = [sys.executable, "-m", "teacher.api", "serve", str(run.folder), "--port", str(port)]
    program = Path(sys.executable).with_name("transformers")
    theirs = [
        str(program), "serve", str(run.teacher), "--port", str(port), "--device", "cpu",
        "--continuous-batching", "--log-level", "error",
    ]  # fmt: skip
    return {"ours": (ours, run.config().name), "transformers serve": (theirs, str(run.teacher))}


@contextmanager
def started(command: list[str]) -> Iterator[str]:
    """A server, and a key for it."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "api.sqlite")
        store.publish_terms("1", "No training.", "no")
        _, key = store.add_account("Benchmark", "internal")
        store.close()
        if "teacher.api" in command:
            place = command.index("serve")
            command = [*command[:place], "--database", f"{folder}/api.sqlite", *command[place:]]
        server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        try:
            yield key
        finally:
            server.terminate()
            server.wait()


async def ask(
    port: int, key: str, model: str, prompts: list[str], at_once: int
) -> tuple[float, float]:
    """(requests per second, median seconds to the first token)."""
    client = openai.AsyncOpenAI(
        api_key=key, base_url=f"http://127.0.0.1:{port}/v1", max_retries=0, timeout=300
    )
    while True:
        try:
            await client.models.list()
            break
        except openai.APIConnectionError:
            await asyncio.sleep(0.2)
    first: list[float] = []
    gate = asyncio.Semaphore(at_once)

    async def one(prompt: str) -> None:
        async with gate:
            started = time.perf_counter()
            waiting = True
            async for chunk in await client.completions.create(
                model=model, prompt=prompt, temperature=0, max_tokens=LONGEST, stream=True
            ):
                if waiting and chunk.choices and chunk.choices[0].text:
                    first.append(time.perf_counter() - started)
                    waiting = False

    await asyncio.gather(*map(one, prompts[: 2 * at_once]))  # as a server that has been running
    first.clear()
    started_at = time.perf_counter()
    await asyncio.gather(*map(one, prompts))
    seconds = time.perf_counter() - started_at
    await client.close()
    return len(prompts) / seconds, statistics.median(first)


if __name__ == "__main__":
    sys.exit(main())
