"""A page to play with a finished run: ask, and watch its models answer token by token.

It listens on this machine alone, and asks nothing of other servers.
"""

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.responses import Response
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from pydantic import BaseModel, ConfigDict, Field
from starlette.middleware.trustedhost import TrustedHostMiddleware

from configs.files import read_json, say
from configs.schema import LabError
from experiment.cost import CountedForward
from experiment.experiment import open_model, open_task, open_teacher, teacher_task
from experiment.plan import Plan
from experiment.run import Run
from measure.evaluate import completion_logits
from measure.report.answers import image_of, shown_rows
from models.generate import generate
from models.language import parameter_count
from models.rows import Rows
from tasks.task import Task
from teacher.api.pages import page

TEMPLATES = Environment(
    loader=ChoiceLoader([PackageLoader("labs", ""), PackageLoader("teacher.api", "")]),
    autoescape=True,
    undefined=StrictUndefined,
)
LOCAL = ["127.0.0.1", "localhost"]
SHOWN = 6  # outcomes of a distribution
EXAMPLES = 8
HOTTEST = 3.0
MOST_TOKENS = 200


class Question(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    text: Annotated[str, Field(max_length=4_000)] = ""
    example: int | None = None
    temperature: Annotated[float, Field(ge=0, le=HOTTEST)] = 0.0
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0


@dataclass
class Player:
    """The models of a run: its teacher, its students and its baseline, the first seed of each."""

    run: Run
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.config = self.run.config()
        if self.config.sold_elsewhere:
            raise LabError(
                f"the teacher of {self.run.folder} is behind an endpoint; there is none to ask"
            )
        self.task = open_task(self.run, self.config)
        self.own_task = teacher_task(self.config, self.run, self.task)
        plan = Plan(self.config)
        self.models = {"teacher": CountedForward(open_teacher(self.run, self.task))}
        for name in [*self.config.recipes, *(n for n in plan.recipes if n == "baseline")]:
            self.models[name] = CountedForward(open_model(self.run, plan.stage(name)))
        self.rows = self.task.evaluation_rows("heldout")
        self.examples = shown_rows(self.task, self.rows, EXAMPLES)

    def task_of(self, model: str) -> Task:
        return self.own_task if model == "teacher" else self.task

    def about(self) -> dict[str, Any]:
        """What the page shows before anything is asked."""
        teacher, result = self.run.cost_of("teacher")["flops"], self.result()
        plan = Plan(self.config)
        models = []
        for name, forward in self.models.items():
            cost = self.run.cost_of(plan.stage(name))["flops"]
            entry = result.get("students", {}).get(name) or result.get("controls", {}).get(name)
            entry = result.get("teacher") if name == "teacher" else entry
            metric = self.task.metrics[self.task.headline]
            quality = (entry or {}).get("quality", {}).get(self.task.headline)
            shown = f"{quality['mean'] * metric.scale:.{metric.digits}f}" if quality else ""
            unit = "%" if metric.is_share else metric.unit
            models.append(
                {
                    "name": name,
                    "params": parameter_count(forward.model),
                    "flops": cost,
                    "share": cost / teacher if teacher else None,
                    "quality": f"{metric.heading} {shown} {unit}" if shown else "",
                }
            )
        return {
            "name": self.config.name,
            "task": self.task.name,
            "position": self.task.position_noun,
            "pictures": self.pictures,
            "models": models,
            "hottest": HOTTEST,
            "examples": [self.example(i) for i in self.examples],
        }

    def example(self, i: int) -> dict[str, str | None]:
        """A held-out row as something to ask."""
        return {
            "text": self.task.question(self.rows, i),
            "image": image_of(self.task, self.rows, i),
        }

    @property
    def pictures(self) -> bool:
        """Whether a question is a picture, which cannot be typed."""
        return self.task.image(self.rows, 0) is not None

    def result(self) -> dict[str, Any]:
        file = self.run.folder / "eval.json"
        return read_json(file) if file.exists() else {}

    def prompt(self, question: Question) -> list[int]:
        if question.example is not None and not 0 <= question.example < len(self.examples):
            raise LabError(f"there is no example {question.example}")
        if self.pictures:
            i = self.examples[question.example or 0]
            return self.rows.prompt(i).tolist()
        return self.task_of(question.model).prompt(question.text)

    def answer(self, question: Question) -> dict[str, Any]:
        """A model's answer: at each token the distribution that it was drawn from, that of the
        teacher there, and the divergence of the two. LabError for a question that it cannot
        read."""
        if question.model not in self.models:
            raise LabError(f"there is no model {question.model!r}; there are {[*self.models]}")
        with self.lock:
            return self.answered(question)

    def answered(self, question: Question) -> dict[str, Any]:
        forward, task = self.models[question.model], self.task_of(question.model)
        prompt, before = self.prompt(question), forward.flops
        longest = min(task.longest_answer, task.longest_row - len(prompt), MOST_TOKENS)
        (written,) = generate(
            forward,
            [np.asarray(prompt)],
            longest=max(1, longest),
            end=task.end,
            temperature=question.temperature,
            generator=torch.Generator().manual_seed(question.seed),
            keep_log_probs=True,
            vocabulary=task.vocabulary,
        )
        flops, tokens = forward.flops - before, written.tokens.tolist()
        softened = question.temperature or 1.0
        own = (written.log_probs / softened).log_softmax(-1)
        theirs = self.of_teacher(question.model, prompt, tokens)
        found = []
        for place, token in enumerate(tokens):
            at = None if theirs is None else (theirs[place] / softened).log_softmax(-1)
            one = {
                "text": "" if token == task.end else task.token_name(token),
                "end": token == task.end,
                "p": float(own[place, token].exp()),
                "outcomes": outcomes_of(own[place], at, task),
            }
            if at is not None:
                one["kl"] = max(0.0, float((at.exp() * (at - own[place])).nan_to_num(0.0).sum()))
            found.append(one)
        return {"tokens": found, "answer": task.render(tokens), "flops": flops}

    def of_teacher(self, model: str, prompt: list[int], tokens: list[int]) -> torch.Tensor | None:
        """The teacher's logits [n, V] at the tokens that another model wrote; None for its own, and
        where the two have different tokens."""
        if model == "teacher" or self.own_task is not self.task:
            return None
        rows = Rows.build([0], [prompt], [tokens])
        teacher = self.models["teacher"].model  # not charged: nobody needs it for an answer
        return completion_logits(teacher, self.task, rows, np.array([0]))[0].cpu()


def outcomes_of(
    own: torch.Tensor, teacher: torch.Tensor | None, task: Task
) -> list[tuple[str, float, float | None]]:
    """(outcome, its probability in a model and in the teacher) of what is likeliest in either, from
    log-probabilities [V]."""
    each = [own] if teacher is None else [own, teacher]
    likeliest = torch.cat([one.topk(min(SHOWN, len(one))).indices for one in each])
    return [
        (
            "end" if token == task.end else task.token_name(token),
            float(own[token].exp()),
            None if teacher is None else float(teacher[token].exp()),
        )
        for token in dict.fromkeys(likeliest.tolist())
    ]


def application(player: Player) -> FastAPI:
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    # another site cannot make its own name point here
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=LOCAL)

    @app.get("/")
    async def home() -> Response:
        return page("play.html", TEMPLATES, name=player.config.name)

    @app.get("/about")
    def about() -> dict[str, Any]:
        return player.about()

    @app.post("/answer")
    def answer(question: Question) -> dict[str, Any]:
        try:
            return player.answer(question)
        except LabError as error:
            raise HTTPException(400, str(error)) from None

    return app


def serve(folder: Path, port: int) -> None:
    """Until Ctrl-C."""
    app = application(Player(Run.finished(folder)))
    say(f"open http://127.0.0.1:{port} in a browser; Ctrl-C ends it")
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")
