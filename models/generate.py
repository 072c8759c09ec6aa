"""Generation: a model answers prompts, in batches, greedily or sampled.

No top-p, top-k or repetition penalty is applied anywhere.
"""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from models.language import Forward, charged, device_of, precise
from models.rows import Rows
from models.states import states_of, states_options

CACHES = ("past_key_values", "cache_params")  # cache arguments of attention and recurrent models
MAX_NUMBERS = 2**28  # logits held at a time: 1 GB of float32


@dataclass(frozen=True)
class Generated:
    """What a model wrote after a prompt of P tokens: n new tokens, EOS included, and their
    log-probability in nats (at temperature 1, whatever the sampling temperature).

    On request also all log-probabilities [n, V] there; the states [P + n - 1, layers, W] after some
    layers, from the first token to the last but one; and the maps [P + n - 1, maps, P + n - 1] of
    attention and value relations (see `states_of`).
    """

    tokens: Tensor
    log_prob: float
    log_probs: Tensor | None = None
    hidden: Tensor | None = None
    maps: Tensor | None = None


class CachedForward:
    """A model with its cache: new token ids [B, new] -> its output at them.

    Recurrent models name the cache argument differently; classifiers have none.
    """

    def __init__(self, forward: Forward) -> None:
        model = getattr(forward, "model", forward)  # unwraps a CountedForward
        accepted = inspect.signature(model.forward).parameters
        name = next((n for n in CACHES if n in accepted), None)
        self.forward, self.cache = forward, DynamicCache(config=model.config) if name else None
        self.options = {name: self.cache, "use_cache": True} if name else {}

    def __call__(self, ids: Tensor, **options: Any) -> Any:
        return self.forward(ids, **self.options, **options)

    def keep(self, rows: Tensor) -> None:
        """Continue with some rows of the batch only."""
        if self.cache is not None:
            self.cache.reorder_cache(rows)


def rows_at_once(most: int, tokens: int, vocabulary: int, numbers: int = MAX_NUMBERS) -> int:
    """How many rows of this many tokens, at most `most`, have at most `numbers` logits in all."""
    return min(most, max(1, numbers // (tokens * vocabulary)))


def answers_of(
    forward: Forward, rows: Rows, batch_rows: int = 512, **options: Any
) -> Iterator[tuple[int, Generated]]:
    """Answer the prompts of all rows, in batches of similar prompt lengths, smaller where a row
    needs much memory. The options are those of `generate`. Yields (index of the row, answer)."""
    # Log-probabilities of all tokens are kept; or logits of one token, and what is made of them.
    tokens = options["longest"] if options.get("keep_log_probs") else 16
    batch_rows = rows_at_once(batch_rows, tokens, options.get("vocabulary") or 1)
    order = np.argsort(rows.prompt_lengths, kind="stable")
    for indices in np.array_split(order, -(-len(order) // batch_rows)):
        answers = generate(forward, [rows.prompt(i) for i in indices], **options)
        yield from zip(indices.tolist(), answers, strict=True)


def generator_on(device: torch.device, generator: torch.Generator | None) -> torch.Generator | None:
    """The generator for draws on a device: one of the CPU seeds another there."""
    if generator is None or generator.device.type == device.type:
        return generator
    seed = int(torch.randint(2**62, (), generator=generator))
    return torch.Generator(device).manual_seed(seed)


@torch.no_grad()
def generate(
    forward: Forward,
    prompts: Sequence[np.ndarray | Tensor],
    *,
    longest: int,
    end: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    separator: int | None = None,
    prompt_temperature: float = 1.0,
    keep_log_probs: bool = False,
    keep_layers: Sequence[int] = (),
    keep_relations: bool = False,
    vocabulary: int | None = None,
    max_thinking_tokens: int | None = None,
    end_of_reasoning: int | None = None,
) -> list[Generated]:
    """Continue B prompts of any lengths, each up to the token `end` or for `longest` tokens.

    All rows advance together, token by token: longer prompts are still being read while shorter
    ones are already continued. So nothing is padded, and no mask is needed.

    Temperature 0 takes the most likely token. With a `separator`, tokens up to it are sampled at
    `prompt_temperature` (a model that invents its own prompts), later ones at `temperature`.
    `keep_layers` counts from 1. Ids from `vocabulary` on, which only pad the matrices of some
    models, are never generated. After `max_thinking_tokens` without it, the token
    `end_of_reasoning` is forced, so that the model must answer (Muennighoff et al. 2025 (s1),
    arXiv 2501.19393, section 3).
    """
    starts = torch.tensor([len(prompt) for prompt in prompts])
    ends = starts + longest
    rows, width = len(prompts), int(ends.max())
    filled = np.zeros((rows, width), np.int64)
    for row, prompt in zip(filled, prompts, strict=True):
        row[: len(prompt)] = prompt
    cached, device = CachedForward(forward), device_of(forward)
    starts, ends, tokens = starts.to(device), ends.to(device), torch.from_numpy(filled).to(device)
    alive = torch.arange(rows, device=device)
    answering = torch.full((rows,), separator is None, device=device)
    thinking = torch.full((rows,), max_thinking_tokens is not None, device=device)
    log_prob = torch.zeros(rows, dtype=torch.float64, device=device)
    log_probs: Tensor | None = None
    hidden: Tensor | None = None
    maps: Tensor | None = None
    options, generator = states_options(keep_layers), generator_on(device, generator)
    read = 0
    for place in range(int(starts.min()), width):
        # the logits of a whole prompt would be large, and only the last are needed
        output = cached(tokens[alive, read:place], logits_to_keep=1, **options)
        logits = output.logits if output.logits.ndim == 2 else output.logits[:, -1]
        logits = precise(logits[:, :vocabulary])
        if keep_layers:
            states, new_maps = charged(forward, states_of, output, keep_layers, keep_relations)
            if hidden is None:
                hidden = states.new_empty((rows, width - 1, *states.shape[2:]))
                maps = states.new_zeros((rows, width - 1, new_maps.shape[2], width - 1))
            hidden[alive, read:place] = states
            maps[alive, read:place, :, :place] = new_maps
        written = place - starts[alive]  # how many tokens each row has written
        writes = written >= 0
        expected = torch.log_softmax(logits[writes], dim=-1)
        if keep_log_probs:
            if log_probs is None:
                log_probs = logits.new_empty((rows, longest, logits.shape[-1]))
            log_probs[alive[writes], written[writes]] = expected
        chosen = logits.argmax(-1)
        for sampled, temp in ((answering, temperature), (~answering, prompt_temperature)):
            sampled = sampled & writes
            if temp > 0 and bool(sampled.any()):
                probabilities = torch.softmax(logits[sampled] / temp, dim=-1)
                chosen[sampled] = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
        if max_thinking_tokens is not None:
            thinking = thinking & ~(writes & (chosen == end_of_reasoning))
            chosen[thinking & (written >= max_thinking_tokens)] = end_of_reasoning
            thinking = thinking & (written < max_thinking_tokens)
        log_prob[alive[writes]] += expected.gather(-1, chosen[writes, None])[:, 0].double()
        chosen = torch.where(writes, chosen, tokens[alive, place])
        tokens[alive, place] = chosen
        if separator is not None:
            answering = answering | (chosen == separator)
        over = writes & ((chosen == end) | (written == longest - 1))
        ends[alive[over]] = place + 1
        if bool(over.all()):
            break
        read = place
        if bool(over.any()):
            # Finished rows leave the batch, so that a few long ones do not hold up the rest.
            keep = (~over).nonzero()[:, 0]
            alive, answering, thinking = alive[keep], answering[keep], thinking[keep]
            cached.keep(keep)
    tokens, log_prob = tokens.cpu(), log_prob.cpu()
    return [
        Generated(
            tokens[row, start:stop],
            float(log_prob[row]),
            None if log_probs is None else log_probs[row, : stop - start],
            None if hidden is None else hidden[row, : stop - 1],
            None if maps is None else maps[row, : stop - 1, :, : stop - 1],
        )
        for row, (start, stop) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True))
    ]
