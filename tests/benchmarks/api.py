"""What continuous batching gives, in ratios of one run. About 2 minutes on an idle machine, after
`make demo`. Exit code 1 if a ratio is below its limit.

    python -m tests.benchmarks.api runs/quickstart

Engine: the answers to held-out rows, asked at once, against `generate` on the same rows. Server:
requests per second and the time to the first token, by OpenAI's client over a socket, many at a
time and one at a time.
"""

import asyncio
import statistics
import subprocess
import sys
import tempfile
import threading
import time
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
ASKED, AT_ONCE = 400, 64


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
    questions = [task.question(rows, i) for i in range(min(ASKED, len(rows)))]
    for name, at_once in (("many at a time", AT_ONCE), ("one at a time", 1)):
        count, first = served(
            run.folder, run.config().name, questions[: ASKED if at_once > 1 else 100], at_once
        )
        print(f"{name}: {count:.0f} requests per second, first token after {1000 * first:.0f} ms")
    return int(any(ratio < LEAST[name] for name, ratio in found.items()))


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


def served(run: Path, model: str, questions: list[str], at_once: int) -> tuple[float, float]:
    """(requests per second, median seconds to the first token) of a server."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "api.sqlite")
        store.publish_terms("1", "No training.", "no")
        _, key = store.add_account("Benchmark", "internal")
        command = [sys.executable, "-m", "teacher.api", "--database", f"{folder}/api.sqlite"]
        server = subprocess.Popen([*command, "serve", str(run), "--port", "8765"], cwd=ROOT)
        try:
            return asyncio.run(ask(key, questions, at_once, model))
        finally:
            server.terminate()
            server.wait()
            store.close()


async def ask(key: str, questions: list[str], at_once: int, model: str) -> tuple[float, float]:
    client = openai.AsyncOpenAI(api_key=key, base_url="http://127.0.0.1:8765/v1", max_retries=0)
    while True:
        try:
            await client.models.list()
            break
        except openai.APIConnectionError:
            await asyncio.sleep(0.1)
    first: list[float] = []
    gate = asyncio.Semaphore(at_once)

    async def one(question: str) -> None:
        async with gate:
            started = time.perf_counter()
            stream = await client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": question}], temperature=0,
                stream=True,
            )  # fmt: skip
            waiting = True
            async for chunk in stream:
                if waiting and chunk.choices[0].delta.content:
                    first.append(time.perf_counter() - started)
                    waiting = False

    started = time.perf_counter()
    await asyncio.gather(*map(one, questions))
    return len(questions) / (time.perf_counter() - started), statistics.median(first)


if __name__ == "__main__":
    sys.exit(main())
