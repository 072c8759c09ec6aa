"""Rules for outputs that are bought through an API: what an endpoint can answer, and who may."""

import ipaddress
from collections.abc import Iterator
from urllib.parse import urlsplit

from configs.schema import Config, LabError, Recipe
from measure.metrics import metrics_of
from tasks.task import Task
from teacher.access import ACCESS, needs_outputs
from teacher.api.tiers import tier_for

# Fields of a request that the recipe decides
DECIDED = {
    "model", "messages", "prompt", "max_tokens", "max_completion_tokens", "temperature", "top_p",
    "seed", "n", "stream", "stop", "echo", "logprobs", "top_logprobs",
}  # fmt: skip
SOLD = [name for name, access in ACCESS.items() if access.sold]


def check_api(config: Config, task: type[Task]) -> Iterator[str]:
    """The teacher's outputs can be bought."""
    api = config.teacher.api
    for name, recipe in config.recipes.items():
        if recipe.outputs.watermark and (api is None or api.url or not api.watermark_key):
            yield (
                f"recipes.{name}.outputs.watermark: the run's own server marks its answers; it "
                "needs teacher.api without a url, and with a watermark_key"
            )
        elif recipe.outputs.watermark and (
            recipe.teachers != ["teacher"] or recipe.sequences != "teacher"
        ):
            yield (
                f"recipes.{name}.outputs.watermark: the teacher's own answers are marked; use "
                "teachers [teacher] and sequences teacher"
            )
        elif recipe.outputs.watermark_share and not recipe.outputs.watermark:
            yield (
                f"recipes.{name}.outputs.watermark_share belongs to outputs.watermark, a bias in "
                "nats; add it"
            )
    if api is not None and api.canaries and (api.url or not api.watermark_key):
        yield (
            "teacher.api.canaries: the run's own server sends them; it needs teacher.api without a "
            "url, and with a watermark_key"
        )
    if api is not None and api.watermark_key is not None and api.watermark_key % 2 == 0:
        yield f"teacher.api.watermark_key: found {api.watermark_key}, expected an odd number"
    if config.teacher.model is None and not config.sold_elsewhere:
        yield "teacher.model is missing; this section is needed, or teacher.api with a url"
    if api is None:
        return
    for name, recipe in config.recipes.items():
        if recipe.outputs.antidistillation:
            yield (
                f"recipes.{name}.outputs.antidistillation: the server of a run does not offer it; "
                "remove teacher.api"
            )
    if task.image is not Task.image:
        yield f"teacher.api: task {task.name} has images, and an endpoint answers text; remove it"
    named = {"model": api.model, "key_env": api.key_env}
    for key, value in named.items():
        if api.url and not value:
            yield f"teacher.api.{key} is missing: an endpoint at a url needs model and key_env"
        if value and not api.url:
            yield f"teacher.api.{key} is for an endpoint at a url; remove it, or name the url"
    if api.endpoint == "completions" and not task.continues_text:
        yield (
            f"teacher.api.endpoint completions continues a text, which a question of task "
            f"{task.name} is not; use chat"
        )
    if api.url is None and not api.permission:
        yield (
            "teacher.api.permission is missing: the terms under which a run sells its own teacher "
            "do not allow that a model is trained on its answers; say who allowed it"
        )
    for key in api.body.keys() & DECIDED:
        yield f"teacher.api.body.{key}: the recipe decides it; remove it here"
    yield from check_url(api.url)
    for name, recipe in config.recipes.items():
        own = api.url is None
        yield from (f"recipes.{name}: {problem}" for problem in check_recipe(recipe, own))
    if config.sold_elsewhere:
        yield from check_unknown_weights(config, task)


def check_unknown_weights(config: Config, task: type[Task]) -> Iterator[str]:
    """Nothing needs the weights of a teacher of which only answers are known."""
    if config.teacher.model is not None or config.teacher.epochs:
        yield "teacher.api.url: the model behind it is not trained here; remove teacher.model"
    for name, recipe in config.recipes.items():
        if recipe.student.initial_layers and "teacher" in recipe.teachers:
            yield f"recipes.{name}.student.initial_layers: the teacher's weights are not known here"
    metrics = metrics_of(task)
    for claim in config.claims():
        metric = metrics.get(claim.metric)
        if metric and metric.positions and metric.needs_teacher:
            yield (
                f"verdict {claim.claim!r}: {claim.metric} compares distributions, and of the "
                "teacher at teacher.api.url only answers are known; choose another metric"
            )


def check_url(url: str | None) -> Iterator[str]:
    """Keys do not travel in the clear."""
    if url is None:
        return
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        yield f"teacher.api.url: found {url!r}, expected an address as in https://host/v1"
    elif parts.scheme == "http" and not is_local(parts.hostname):
        yield f"teacher.api.url: {url} would send your key in the clear; use https"
    elif parts.username or parts.query or parts.fragment:
        yield f"teacher.api.url: found {url!r}, expected no more than https://host/v1"


def is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_recipe(recipe: Recipe, own: bool) -> Iterator[str]:
    """Outputs through an API are answers to prompts, of the one model behind it. own: sold by this
    run's own server."""
    if not ACCESS[recipe.access].teacher or "teacher" not in recipe.teachers:
        return
    if recipe.writes_itself or not needs_outputs(recipe) or recipe.sequences != "teacher":
        yield (
            "through teacher.api a teacher answers prompts, and does not score other texts: use "
            "sequences teacher, without student.on_policy"
        )
    if recipe.outputs.prompts != "train":
        yield "outputs.prompts: an endpoint answers prompts; use prompts train"
    if recipe.access not in SOLD:
        yield f"access {recipe.access} is not sold through an API; use {', '.join(SOLD)}"
    elif own and ACCESS[recipe.access].uses_k:
        try:
            tier_for(recipe.access, recipe.outputs.k)
        except LabError as error:
            yield f"outputs.k: {error}"
    if ACCESS[recipe.access].probabilities and recipe.outputs.temperature not in (0, 1):
        yield (
            f"outputs.temperature {recipe.outputs.temperature:g}: the log-probabilities of an "
            "endpoint are at the temperature of its answers, and students learn those at 1; use 0 "
            "or 1"
        )
