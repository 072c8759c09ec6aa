"""Rules for outputs that are bought through an API: what an endpoint can answer, and who may."""

import ipaddress
from collections.abc import Iterator
from urllib.parse import urlsplit

from configs.schema import Config, Recipe
from tasks.task import Task
from teacher.access import ACCESS, needs_outputs

SOLD = [name for name, access in ACCESS.items() if access.sold]


def check_api(config: Config, task: type[Task]) -> Iterator[str]:
    api = config.teacher.api
    if api is None:
        return
    if task.image is not Task.image:
        yield f"teacher.api: task {task.name} has images, and an endpoint answers text; remove it"
    named = {"model": api.model, "key_env": api.key_env}
    for key, value in named.items():
        if api.url and not value:
            yield f"teacher.api.{key} is missing: an endpoint at a url needs model and key_env"
        if value and not api.url:
            yield f"teacher.api.{key} is for an endpoint at a url; remove it, or name the url"
    yield from check_url(api.url)
    for name, recipe in config.recipes.items():
        yield from (f"recipes.{name}: {problem}" for problem in check_recipe(recipe))


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


def check_recipe(recipe: Recipe) -> Iterator[str]:
    """Outputs through an API are answers to prompts, of the one model behind it."""
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
    if ACCESS[recipe.access].probabilities and recipe.outputs.temperature not in (0, 1):
        yield (
            f"outputs.temperature {recipe.outputs.temperature:g}: the log-probabilities of an "
            "endpoint are at the temperature of its answers, and students learn those at 1; use 0 "
            "or 1"
        )
