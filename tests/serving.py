"""A small teacher behind a real server on a free port, for tests of it and of what asks it."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
import uvicorn

from configs.schema import Model
from models.language import build_model, initialise
from models.rows import Rows
from tasks.pronounce import Pronounce
from tasks.task import Task
from teacher.api.app import create_app
from teacher.api.defence import Defence
from teacher.api.engine import Engine
from teacher.api.pages import add_pages
from teacher.api.prompts import TaskPrompts
from teacher.api.service import NONE, Prompts, Service
from teacher.api.store import Store
from teacher.source import Source, TeacherRow

PASSWORD = "the owner's"
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@contextmanager
def small_teacher(
    folder: Path, task: Task | None = None, defence: Defence = NONE
) -> Iterator[SimpleNamespace]:
    """An untrained teacher of a task, with an account's page: what `serving` gives, task, model."""
    task = task or Pronounce(limit=300)
    model = initialise(build_model(Model(initializer_range=0.2, **SHAPE), task), 0).eval()
    with serving(folder, Engine(model, task), TaskPrompts(task), "small", defence) as served:
        served.task, served.model = task, model
        yield served


@contextmanager
def serving(
    folder: Path, engine: Engine, prompts: Prompts, name: str, defence: Defence = NONE
) -> Iterator[SimpleNamespace]:
    """store, engine, service, port, url and home."""
    store = Store(folder / "api.sqlite")
    store.publish_terms("1", "No training.", "no")
    service = Service(store, engine, prompts, name, defence)
    app = create_app(service, b"salt")
    add_pages(app, service, PASSWORD, "lead")
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield SimpleNamespace(
        store=store, engine=engine, service=service, port=port,
        url=f"http://127.0.0.1:{port}/v1", home=f"http://127.0.0.1:{port}/",
    )  # fmt: skip
    server.should_exit = True
    thread.join()
    engine.close()
    store.close()


def answers(source: Source, rows: Rows, temperature: float = 0.0) -> dict[int, TeacherRow]:
    """{index of the row: its answer}."""
    return {row.index: row for row in source.answer(rows, temperature, True, torch.Generator())}
