"""Where a run's outputs come from: the teacher's weights or, with teacher.api, an endpoint."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from configs.files import say
from configs.schema import Api, LabError, Recipe
from experiment.cost import CountedForward
from experiment.experiment import Experiment, source_of
from teacher.outputs import OutputsRequest
from teacher.source import Source

if TYPE_CHECKING:
    from teacher.endpoint import Endpoint, Offer

ROOT = Path(__file__).parent.parent
NEEDS_EXTRA = 'teacher.api needs more packages: pip install -c constraints.txt -e ".[api]"'

OpenSource = Callable[[str, Recipe, OutputsRequest], Source]


@contextmanager
def sources(experiment: Experiment) -> Iterator[OpenSource]:
    """(stage, recipe, request) -> the source of these outputs. A run that sells its own teacher
    starts the server with the first of them, and ends it when the block ends."""
    with ExitStack() as stack:
        seller = Seller(experiment, stack)

        def open_source(stage: str, recipe: Recipe, request: OutputsRequest) -> Source:
            if experiment.config.teacher.api is None:
                return source_of(experiment, recipe, request, CountedForward)
            return endpoint_of(experiment, stage, request, seller)

        yield open_source


def endpoint_of(
    experiment: Experiment, stage: str, request: OutputsRequest, seller: "Seller"
) -> "Endpoint":
    """Ready to be asked: the key is known, the terms allow it, and what the recipe learns from is
    revealed. LabError otherwise, before anything is paid."""
    from teacher.endpoint import Endpoint, Journal

    offer = seller.offer(request.access, request.k, request.name)
    settings = experiment.config.teacher.api
    endpoint = Endpoint(
        experiment.task,
        offer,
        settings,
        request.access,
        request.k,
        Journal(experiment.run.checkpoints(stage) / "answers.sqlite"),
        experiment.config.teacher.seed,
    )
    endpoint.require_revealed(experiment.task.question(experiment.validation, 0))
    return endpoint


class Seller:
    """Who sells the teacher's outputs: an endpoint of the config's, or the run itself, which then
    serves its own teacher with `python -m teacher.api serve`, as a process on this machine."""

    def __init__(self, experiment: Experiment, stack: ExitStack) -> None:
        self.config, self.run, self.stack = experiment.config, experiment.run, stack
        self.database = self.run.folder / "api.sqlite"
        self.terms_shown = False

    def offer(self, access: str, k: int | None, customer: str) -> "Offer":
        """What is sold to a key that may see what a recipe with this access learns from. LabError
        without packages or key, or if the terms forbid it."""
        try:
            from teacher.endpoint import Offer
        except ImportError:
            raise LabError(NEEDS_EXTRA) from None
        settings: Api = self.config.teacher.api
        if settings.url is None:
            url, model = self.own_url, self.config.name
            key = self.own_key(access, k, customer)
        else:
            url, model, key = settings.url, settings.model, os.environ.get(settings.key_env, "")
            if not key:
                raise LabError(f"the environment variable {settings.key_env} holds no key; set it")
        offer = Offer.of(url, model, key, settings)
        if not self.terms_shown:
            say(f"terms of {model}, version {offer.terms}, allow distillation: "
                f"{offer.allows_distillation}. {offer.terms_text}".rstrip())  # fmt: skip
            self.terms_shown = True
        if offer.allows_distillation == "no" and not settings.permission:
            raise LabError(
                f"the terms of {model} do not allow that a model is trained on its answers; if its "
                "owner has allowed it, say so in teacher.api.permission"
            )
        return offer

    @cached_property
    def own_url(self) -> str:
        """The address of the run's own server, which starts now. LabError if it does not."""
        command = [sys.executable, "-m", "teacher.api", "--database", str(self.database.resolve())]
        process = subprocess.Popen(
            [*command, "serve", str(self.run.folder.resolve()), "--port", "0"],
            cwd=ROOT, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.stack.callback(end, process)
        for line in process.stdout:
            address = next((word for word in line.split() if "://" in word), None)
            if address:
                return address
        raise LabError(f"the teacher of {self.run.folder} is not served; its server says why above")

    def own_key(self, access: str, k: int | None, customer: str) -> str:
        """The key of a new account of the tier that reveals this."""
        from teacher.api.store import Store
        from teacher.api.tiers import tier_for

        store = Store(self.database)
        try:
            return store.add_account(customer, tier_for(access, k))[1]
        finally:
            store.close()


def end(process: subprocess.Popen) -> None:
    process.terminate()
    process.wait()
    process.stdout.close()
