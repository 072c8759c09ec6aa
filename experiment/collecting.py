"""Where a run's outputs come from: the teacher's weights or, with teacher.api, an endpoint."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from configs.files import say, sha256_of_json, write_json
from configs.schema import Api, LabError, Recipe
from experiment.bought import (
    PROBED,
    Bought,
    evaluated_rows,
    lowest,
    open_bought,
    write_bought,
)
from experiment.cost import CountedForward
from experiment.experiment import Experiment, source_of, teacher_made_from
from experiment.log import OutputsLog
from experiment.stages import StageResult
from models.rows import Rows, row_id
from teacher.outputs import UNMARKED, Mark, OutputsRequest
from teacher.source import Source

if TYPE_CHECKING:
    from teacher.endpoint import Endpoint
    from teacher.offer import Offer

ROOT = Path(__file__).parent.parent
JOURNAL = "answers.sqlite"
KEY = "watermark.json"
MOST_OTHER = 0.25  # of the probes: the same model can round otherwise in another batch
NEEDS_EXTRA = 'teacher.api needs more packages: pip install -c constraints.txt -e ".[api]"'

OpenSource = Callable[[str, Recipe, OutputsRequest], Source]


@contextmanager
def sources(experiment: Experiment) -> Iterator[OpenSource]:
    """(stage, recipe, request) -> the source of these outputs. A run that sells its own teacher
    starts the server with the first of them, and ends it when the block ends."""
    with ExitStack() as stack:
        seller = Seller(experiment, stack)

        def open_source(stage: str, recipe: Recipe, request: OutputsRequest) -> Source:
            if experiment.config.teacher.api is None or recipe.teachers != ["teacher"]:
                return source_of(experiment, recipe, request, CountedForward)
            unknown = experiment.config.sold_elsewhere and not seller.asked
            endpoint = endpoint_of(
                experiment, stage, request.access, request.k, seller, request.mark
            )
            if unknown:
                with closed_after_errors(endpoint):
                    require_same_model(experiment, stage, endpoint)
            return endpoint

        yield open_source


def endpoint_of(
    experiment: Experiment,
    stage: str,
    access: str,
    k: int | None,
    seller: "Seller",
    mark: Mark = UNMARKED,
) -> "Endpoint":
    """Ready to be asked: the key is known, the terms allow it, and what the recipe learns from is
    revealed. LabError otherwise, before anything is paid. mark: of the answers."""
    offer = seller.offer(access, k, stage.removeprefix("outputs/"), mark)
    from teacher.endpoint import Endpoint
    from teacher.journal import Journal

    teacher = experiment.run.manifest["stages"].get("teacher", {}).get("sha256", offer.url)
    endpoint = Endpoint(
        experiment.task,
        offer,
        experiment.config.teacher.api,
        access,
        k,
        Journal(
            experiment.run.checkpoints(stage) / JOURNAL, f"{teacher} {offer.model} {offer.terms}"
        ),
        seed_of(experiment, stage),
    )
    with closed_after_errors(endpoint):
        endpoint.require_revealed(experiment.task.question(experiment.validation, 0))
    return endpoint


def seed_of(experiment: Experiment, stage: str) -> int:
    """Of the answers. The run's own server draws others for every account, as without a seed, so
    that answers tell accounts apart."""
    seed = experiment.config.teacher.seed
    return seed if experiment.config.sold_elsewhere else row_id(f"{seed} {stage}") % 2**31


@contextmanager
def closed_after_errors(source: "Endpoint") -> Iterator[None]:
    try:
        yield
    except BaseException:
        source.close()
        raise


def check_seller(experiment: Experiment) -> None:
    """Before a run folder is made: one process buys, and an endpoint elsewhere answers, knows the
    key, and its terms, which are shown, allow it. LabError otherwise."""
    processes = experiment.accelerator.num_processes
    if experiment.config.teacher.api and processes > 1:
        raise LabError(
            f"{processes} processes would each pay for the answers: with teacher.api launch one"
        )
    if experiment.config.sold_elsewhere:
        with ExitStack() as stack:
            show_terms(Seller(experiment, stack).offer("text", None, "terms"))


def show_terms(offer: "Offer") -> None:
    say(f"terms of {offer.model}, version {offer.terms}, allow distillation: "
        f"{offer.allows_distillation}. {offer.terms_text}".rstrip())  # fmt: skip


def ask_teacher(experiment: Experiment, stage: str) -> StageResult:
    """Get to know the teacher behind an endpoint: its greedy answers to rows of the evaluation
    splits."""
    config, task = experiment.config, experiment.task
    splits = ("validation", *task.evaluation_splits)
    rows = {split: evaluated_rows(config, task, split) for split in splits}
    with ExitStack() as stack:
        endpoint = endpoint_of(experiment, stage, "text", None, Seller(experiment, stack))
        count = sum(map(len, rows.values()))
        with closing(endpoint), OutputsLog(experiment, stage, count, endpoint) as log:
            answers = {split: texts_of(endpoint, found, log) for split, found in rows.items()}
    offer = endpoint.offer
    bought = Bought(
        url=offer.url, model=offer.model, terms=offer.terms,
        since=datetime.now(UTC).date().isoformat(), answers=answers,
    )  # fmt: skip
    artifact = {
        "sha256": sha256_of_json([offer.url, offer.model, offer.terms, bought.since]),
        "files": write_bought(experiment.run, bought),
        "params": None,
        "bought": endpoint.origin(),
    }
    cost = {**log.watch.read(0), "steps": 0, **endpoint.bill()}
    return cost, artifact | {"made_from": teacher_made_from(experiment, config.teacher.seed)}


def texts_of(endpoint: "Endpoint", rows: Rows, log: OutputsLog) -> dict[str, str]:
    """{row id: its greedy answer}; an answer that the task cannot read is empty."""
    texts = dict.fromkeys(map(str, rows.ids[np.arange(len(rows))]), "")
    for row in endpoint.answer(rows, 0.0, False, torch.Generator()):
        texts[str(row.id)] = endpoint.task.render(row.tokens[row.prompt_length :].tolist())
        log.progress(1)
    return texts


def require_same_model(experiment: Experiment, stage: str, endpoint: "Endpoint") -> None:
    """Ask again some of what was asked first, at the cost of this stage. LabError if the model
    behind the name answers otherwise, or has other terms."""
    config, known = experiment.config, open_bought(experiment.run)
    if endpoint.offer.terms != known.terms:
        raise LabError(
            f"{known.model} has terms version {endpoint.offer.terms} now, and this run began under "
            f"version {known.terms}; read them, and begin again under another name=..."
        )
    rows = lowest(evaluated_rows(config, experiment.task, "validation"), PROBED)
    endpoint.journal.set_aside(rows.ids.tolist())  # asked again after each start
    with OutputsLog(experiment, stage, len(rows), endpoint) as log:
        texts = texts_of(endpoint, rows, log)
    other = [i for i, text in texts.items() if text != known.answers["validation"][i]]
    if len(other) > MOST_OTHER * len(rows):
        raise LabError(
            f"{known.model} at {known.url} answers {len(other)} of {len(rows)} questions "
            f"otherwise than on {known.since}: there is another model behind the name; begin "
            "again under another name=..."
        )


class Seller:
    """Who sells the teacher's outputs: an endpoint of the config's, or the run itself, which then
    serves its own teacher with `python -m teacher.api serve`, as a process on this machine."""

    def __init__(self, experiment: Experiment, stack: ExitStack) -> None:
        self.config, self.run, self.stack = experiment.config, experiment.run, stack
        self.database = self.run.folder / "api.sqlite"
        self.asked = False

    def offer(self, access: str, k: int | None, customer: str, mark: Mark = UNMARKED) -> "Offer":
        """What is sold to a key that may see what a recipe with this access learns from. LabError
        without packages or key, or if the terms forbid it."""
        try:
            from teacher.offer import Offer
        except ImportError:
            raise LabError(NEEDS_EXTRA) from None
        settings: Api = self.config.teacher.api
        if settings.url is None:
            url, model = self.own_url, self.config.name
            key = self.own_key(access, k, customer, mark)
        else:
            url, model = settings.url, settings.model
            key = os.environ.get(settings.key_env, "").strip()
            if not (key and key.isascii() and key.isprintable()):
                raise LabError(f"the environment variable {settings.key_env} holds no key; set it")
        offer = Offer.of(url, model, key, settings)
        if settings.url is None and not self.asked:
            show_terms(offer)
        self.asked = True
        if offer.allows_distillation == "no" and not settings.permission:
            raise LabError(
                f"the terms of {model}, version {offer.terms}, do not allow that a model is "
                f"trained on its answers: {offer.terms_text[:300]!r}. If its owner has allowed it, "
                "say who in teacher.api.permission"
            )
        return offer

    @cached_property
    def own_url(self) -> str:
        """The address of the run's own server, which starts now. LabError if it does not."""
        command = [sys.executable, "-m", "teacher.api", "--database", str(self.database.resolve())]
        command += ["serve", str(self.run.folder.resolve()), "--port", "0", "--no-admin"]
        marked = any(recipe.outputs.watermark for recipe in self.config.recipes.values())
        canaries = self.config.teacher.api.canaries
        if marked or canaries:
            command += ["--key", str(self.key_file.resolve()), "--canaries", str(canaries)]
        if marked:
            command += ["--watermark", "0"]  # unless an account has its own
        process = subprocess.Popen(
            [*command, "--end-with-input"],  # even if this process is killed
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.stack.callback(end, process)
        for line in process.stdout:
            address = next((word for word in line.split() if "://" in word), None)
            if address:
                return address
        raise LabError(f"the teacher of {self.run.folder} is not served; its server says why above")

    @property
    def key_file(self) -> Path:
        """The key of the config, as a server reads it."""
        from teacher.watermark import KeyFile

        file = self.run.folder / KEY
        key = KeyFile(key=self.config.teacher.api.watermark_key, salt=self.config.name)
        write_json(file, key.model_dump())
        return file

    def own_key(self, access: str, k: int | None, customer: str, mark: Mark) -> str:
        """The key of a new account of the tier that reveals this."""
        from teacher.api.store import Store
        from teacher.api.tiers import tier_for

        store = Store(self.database)
        try:
            return store.add_account(customer, tier_for(access, k), *mark)[1]
        finally:
            store.close()


def end(process: subprocess.Popen) -> None:
    process.terminate()
    process.communicate()
