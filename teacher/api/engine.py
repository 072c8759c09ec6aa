"""Continuous batching: requests that arrive together are answered together.

Every step extends all rows of the batch by one token. A row leaves when it is done, and rows that
wait join before the next step: their prompts are read in one pass, and their caches are padded on
the left to the length of the batch.
"""

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from configs.schema import LabError
from models.language import device_of

Step = tuple[int, Tensor]  # a token, and the log-probabilities [V] that it was drawn from


@dataclass(eq=False)
class Job:
    """One answer to one prompt. `deliver` is called from the engine's thread with every token, and
    with None at the end; `cancelled` ends it early."""

    prompt: list[int]
    longest: int
    deliver: Callable[[Step | None], None]
    temperature: float = 1.0
    top_p: float = 1.0
    bias: dict[int, float] = field(default_factory=dict)
    seed: int = 0
    cancelled: bool = False

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        self.tokens: list[int] = []


@dataclass(eq=False)
class Score:
    """A text to be scored. `deliver` is called from the engine's thread, with the log-probabilities
    [P - 1, V] of every token but the first, or with None if the engine was closed."""

    tokens: list[int]
    deliver: Callable[[Tensor | None], None]


class Batch:
    """The rows that are being answered: their cache, and which of its places hold tokens."""

    def __init__(self, jobs: list[Job], cache: DynamicCache, filled: Tensor, last: Tensor) -> None:
        self.jobs, self.cache = jobs, cache
        self.filled = filled  # [B, L], False at the padding on the left
        self.last = last  # [B], the token that is read next

    def joined(self, other: "Batch") -> "Batch":
        """Both, the shorter padded on the left."""
        length = max(self.filled.shape[1], other.filled.shape[1])
        layers = []
        for mine, theirs in zip(self.cache.layers, other.cache.layers, strict=True):
            keys, values = (
                torch.cat([padded(a, length), padded(b, length)])
                for a, b in ((mine.keys, theirs.keys), (mine.values, theirs.values))
            )
            layers.append((keys, values))
        filled = torch.cat(
            [
                nn.functional.pad(each.filled, (length - each.filled.shape[1], 0))
                for each in (self, other)
            ]
        )
        last = torch.cat([self.last, other.last])
        return Batch([*self.jobs, *other.jobs], cache_of(layers), filled, last)

    def kept(self, rows: list[int]) -> "Batch":
        """Some of the rows, without the places that only others filled."""
        filled = self.filled[rows]
        start = int(filled.any(0).int().argmax())
        layers = [
            (layer.keys[rows, :, start:], layer.values[rows, :, start:])
            for layer in self.cache.layers
        ]
        return Batch(
            [self.jobs[row] for row in rows], cache_of(layers), filled[:, start:], self.last[rows]
        )


def padded(tensor: Tensor, length: int) -> Tensor:
    """[B, H, L, D] -> [B, H, length, D], zeros on the left."""
    return nn.functional.pad(tensor, (0, 0, length - tensor.shape[2], 0))


def cache_of(layers: list[tuple[Tensor, Tensor]]) -> DynamicCache:
    cache = DynamicCache()
    for number, (keys, values) in enumerate(layers):
        cache.update(keys, values, number)
    return cache


class Engine:
    """Answers jobs with one model, in a thread of its own. LabError for a model whose cache cannot
    be padded: a recurrent one, or one with a sliding window."""

    def __init__(self, model: nn.Module, *, end: int, vocabulary: int, most_rows: int = 64) -> None:
        self.model, self.end, self.vocabulary, self.most_rows = model, end, vocabulary, most_rows
        cache = DynamicCache(config=model.config)
        if not all(type(layer) is DynamicLayer for layer in cache.layers):
            raise LabError(
                f"a model of architecture {model.config.model_type} cannot be served: its rows "
                "cannot be answered together; use one with plain attention, such as llama"
            )
        self.waiting: queue.SimpleQueue[Job | Score | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def submit(self, job: Job | Score) -> None:
        self.waiting.put(job)

    def close(self) -> None:
        """Stop after the current step; jobs that are not done end without an answer."""
        self.waiting.put(None)
        self.thread.join()

    def run(self) -> None:
        batch: Batch | None = None
        while True:
            joining = self.joining(batch)
            if joining is None:
                for job in batch.jobs if batch else ():
                    job.deliver(None)
                return
            if joining:
                new = self.begun(joining)
                batch = new if batch is None else batch.joined(new)
            batch = self.advanced(batch)

    def joining(self, batch: Batch | None) -> list[Job] | None:
        """The jobs that join before the next step; waits for one if nothing else is to do. None to
        stop."""
        room = self.most_rows - (len(batch.jobs) if batch else 0)
        found: list[Job] = []
        while len(found) < room:
            try:
                job = self.waiting.get(block=batch is None and not found)
            except queue.Empty:
                break
            if job is None:
                for one in found:
                    one.deliver(None)
                return None
            if isinstance(job, Score):
                job.deliver(self.scored(job.tokens))
            elif job.cancelled:
                job.deliver(None)
            else:
                found.append(job)
        return found

    @torch.no_grad()
    def scored(self, tokens: list[int]) -> Tensor:
        ids = torch.tensor([tokens], device=device_of(self.model))
        logits = self.model(ids, use_cache=False).logits[0, :-1, : self.vocabulary]
        return torch.log_softmax(logits.float().cpu(), dim=-1)

    @torch.no_grad()
    def begun(self, jobs: list[Job]) -> Batch:
        """Read the prompts but for their last token, which the first step reads."""
        length = max(len(job.prompt) for job in jobs)
        tokens = torch.zeros((len(jobs), length), dtype=torch.long)
        filled = torch.zeros((len(jobs), length), dtype=torch.bool)
        for row, job in enumerate(jobs):
            tokens[row, length - len(job.prompt) :] = torch.tensor(job.prompt)
            filled[row, length - len(job.prompt) :] = True
        cache = DynamicCache(config=self.model.config)
        last = tokens[:, -1]
        if length > 1:
            self.forward(tokens[:, :-1], filled[:, :-1], cache)
        return Batch(jobs, cache, filled[:, :-1], last)

    @torch.no_grad()
    def advanced(self, batch: Batch) -> Batch | None:
        """Every row of the batch one token longer, without those that are done."""
        device = device_of(self.model)
        filled = nn.functional.pad(batch.filled, (0, 1), value=True)
        logits = self.forward(batch.last[:, None], filled, batch.cache)
        log_probs = distribution(logits[:, -1, : self.vocabulary].float().cpu(), batch.jobs)
        chosen = [draw(row, job) for row, job in zip(log_probs, batch.jobs, strict=True)]
        alive = []
        for row, (job, token) in enumerate(zip(batch.jobs, chosen, strict=True)):
            job.tokens.append(token)
            if not job.cancelled:
                job.deliver((token, log_probs[row]))
            if job.cancelled or token == self.end or len(job.tokens) == job.longest:
                job.deliver(None)
            else:
                alive.append(row)
        batch.filled, batch.last = filled, torch.tensor(chosen, device=device)
        if not alive:
            return None
        return batch if len(alive) == len(batch.jobs) else batch.kept(alive)

    def forward(self, tokens: Tensor, filled: Tensor, cache: DynamicCache) -> Tensor:
        """Logits [B, 1, V] after the last of these tokens; `filled` covers the cache, too."""
        device = device_of(self.model)
        positions = (filled.long().cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        return self.model(
            tokens.to(device),
            attention_mask=filled.long().to(device),
            position_ids=positions.to(device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits


def distribution(logits: Tensor, jobs: list[Job]) -> Tensor:
    """[B, V] log-probabilities that the tokens are drawn from: after the bias, the temperature and
    top_p of each job. At temperature 0 they are those of temperature 1."""
    for row, job in enumerate(jobs):
        for token, bias in job.bias.items():
            logits[row, token] += bias
    temperature = torch.tensor([job.temperature or 1.0 for job in jobs])
    log_probs = torch.log_softmax(logits / temperature[:, None], dim=-1)
    rows = [row for row, job in enumerate(jobs) if job.top_p < 1]
    if rows:
        log_probs[rows] = nucleus(log_probs[rows], torch.tensor([jobs[row].top_p for row in rows]))
    return log_probs


def nucleus(log_probs: Tensor, top_p: Tensor) -> Tensor:
    """The fewest likeliest outcomes that hold at least top_p, renormalised (Holtzman et al. 2019,
    arXiv 1904.09751, section 3.1)."""
    ordered, order = log_probs.sort(-1, descending=True)
    before = ordered.exp().cumsum(-1) - ordered.exp()
    ordered = ordered.masked_fill(before >= top_p[:, None], -torch.inf)
    kept = torch.full_like(log_probs, -torch.inf).scatter(-1, order, ordered)
    return torch.log_softmax(kept, dim=-1)


def draw(log_probs: Tensor, job: Job) -> int:
    """A token from [V] log-probabilities by the job's own generator, so that it does not depend on
    who else is in the batch."""
    if job.temperature == 0:
        return int(log_probs.argmax())
    cumulative = log_probs.double().exp().cumsum(-1)
    point = torch.rand((), generator=job.generator, dtype=torch.float64) * cumulative[-1]
    return int(torch.searchsorted(cumulative, point, right=True).clamp(max=len(log_probs) - 1))
