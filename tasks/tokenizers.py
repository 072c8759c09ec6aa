"""Tokenizers of pretrained models, made fit for a task: an end mark, padding, a chat template that
says the same tomorrow."""

import re
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from typing import Any

from transformers import PreTrainedTokenizerBase

from configs.schema import LabError
from models.pretrained import pretrained_tokenizer

DATE = datetime(2025, 1, 1)
CHAT_SECONDS = 5.0


def open_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, in a GGUF file or of a hub id. LabError if it cannot be loaded, or
    if no answer could end."""
    try:
        tokenizer = pretrained_tokenizer(name)
    except LabError as error:
        raise LabError(f"task.tokenizer {name!r} cannot be loaded: {error}") from None
    if isinstance(tokenizer.chat_template, str):
        tokenizer.chat_template = with_fixed_date(tokenizer.chat_template)
    if tokenizer.eos_token_id is None:
        raise LabError(
            f"task.tokenizer {name!r} has no EOS token: an answer could not end; set eos_token in "
            "its tokenizer_config.json"
        )
    asks = [{"role": "user", "content": "How many?"}]
    if not ends_in_time(lambda: chat_prompt(tokenizer, asks)):
        raise LabError(
            f"task.tokenizer {name!r}: its chat template takes longer than {CHAT_SECONDS} s; "
            "remove it, or use another tokenizer"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def chat_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]
) -> list[int] | None:
    """The tokens of a conversation that the assistant is to continue, by the tokenizer's chat
    template; None if it has none."""
    if not tokenizer.chat_template:
        return None
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]


def ends_in_time(work: Callable[[], Any]) -> bool:
    """Whether work ends within CHAT_SECONDS; errors are left for the next call to raise."""

    def quietly() -> None:
        with suppress(Exception):
            work()

    thread = threading.Thread(target=quietly, daemon=True)
    thread.start()
    thread.join(CHAT_SECONDS)
    return not thread.is_alive()


def with_fixed_date(template: str) -> str:
    """A chat template that prints a fixed date instead of today's: else tomorrow's rows would be
    others."""
    call = r"""strftime_now\(\s*(['"])(.*?)\1\s*\)"""
    return re.sub(call, lambda found: repr(DATE.strftime(found[2])), template)
