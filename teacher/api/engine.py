"""Continuous batching: requests that arrive together are answered together.

Every step extends all rows of the batch by one token. A row leaves when it is done, and rows that
wait join before the next step: their prompts are read in one pass, and their caches are written
into the slots of those that left.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from configs.schema import LabError
from models.language import device_of
from teacher.watermark import Watermark

ROOM = 16  # jobs join when this fraction of the batch is free
SPARE = 8  # columns
MOST_PADDING = 256  # tokens in one reading of prompts
# A token, and the log-probabilities [V] that it was drawn from if the job wants them
Step = tuple[int, Tensor | None]
Delivered = Step | Exception | None  # an error ends the job; so does None


class Answered(Protocol):
    """What the engine needs to know of a task."""

    end: int
    vocabulary: int
    longest_row: int


@dataclass(eq=False)
class Job:
    """One answer to one prompt. `deliver` is called from the engine's thread with every token, and
    with None, or an error, at the end; `cancelled` ends it early."""

    prompt: list[int]
    longest: int
    deliver: Callable[[Delivered], None]
    temperature: float = 1.0
    top_p: float = 1.0
    bias: dict[int, float] = field(default_factory=dict)
    seed: int = 0
    watermark: Watermark | None = None
    wants_log_probs: bool = False
    cancelled: bool = False

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        self.tokens: list[int] = []


@dataclass(eq=False)
class Score:
    """A text to be scored. `deliver` is called from the engine's thread, with the log-probabilities
    [P - 1, V] of every token but the first, with an error, or with None if the engine was closed.
    """

    tokens: list[int]
    deliver: Callable[[Tensor | Exception | None], None]
    watermark: Watermark | None = None


class SlotLayer(DynamicLayer):
    """Keys and values of one layer, [slots, H, columns, D]. The rows that are being answered are
    the first ones; a new token is written into the next column, so that nothing is copied."""

    def __init__(self, slots: int, columns: int) -> None:
        super().__init__()
        self.slots, self.columns, self.rows, self.length = slots, columns, 0, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.stored = [
            new.new_zeros((self.slots, new.shape[1], self.columns, new.shape[3]))
            for new in (key_states, value_states)
        ]
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        rows, end = len(key_states), self.length + key_states.shape[2]
        for stored, new in zip(self.stored, (key_states, value_states), strict=True):
            stored[:rows, :, self.length : end] = new
        self.length = end
        keys, values = (stored[:rows, :, :end] for stored in self.stored)
        return keys, values

    def get_seq_length(self) -> int:
        return self.length


class Batch:
    """The rows that are being answered. Each has a slot, and its tokens end where those of all
    others do; a row that is done is replaced by one that waits, or by the last one."""

    def __init__(self, layers: int, slots: int, columns: int) -> None:
        self.cache = DynamicCache()
        self.cache.layers = [SlotLayer(slots, columns) for _ in range(layers)]
        self.columns, self.length = columns, 0
        self.jobs: list[Job] = []
        self.filled = torch.zeros((slots, columns), dtype=torch.bool)
        self.last = torch.zeros(slots, dtype=torch.long)  # the token that each row reads next

    def add(self, jobs: list[Job], cache: DynamicCache, filled: Tensor, last: Tensor) -> None:
        """Rows whose prompts are in a cache of their own, padded on the left: filled [B, P]."""
        start, more = len(self.jobs), filled.shape[1]
        if not self.jobs:
            self.move_to(more)
        elif self.length < more:
            self.shift(more - self.length)
        rows, columns = slice(start, start + len(jobs)), slice(self.length - more, self.length)
        for mine, theirs in zip(self.cache.layers, cache.layers, strict=True):
            if more:
                if not mine.is_initialized:
                    mine.lazy_initialization(theirs.keys, theirs.values)
                for stored, new in zip(mine.stored, (theirs.keys, theirs.values), strict=True):
                    stored[rows, :, columns] = new
        self.filled[rows] = False
        self.filled[rows, columns] = filled
        self.last[rows] = last
        self.jobs += jobs

    def drop(self, rows: list[int]) -> None:
        """Rows that are done: the last ones take their slots."""
        gone, count = set(rows), len(self.jobs) - len(rows)
        holes = [row for row in rows if row < count]
        movers = [row for row in range(count, len(self.jobs)) if row not in gone]
        if holes:
            for layer in self.cache.layers:
                for stored in layer.stored:
                    used = stored[:, :, : self.length]
                    used[holes] = used[movers]
            self.filled[holes], self.last[holes] = self.filled[movers], self.last[movers]
            for hole, mover in zip(holes, movers, strict=True):
                self.jobs[hole] = self.jobs[mover]
        del self.jobs[count:]

    def make_room(self) -> None:
        """Give up columns that only rows of the past have filled, where they are many."""
        used = self.filled[: len(self.jobs), : self.length].any(0)
        unused = int(used.int().argmax()) if len(used) else 0
        if self.length == self.columns or unused > max(8, self.length // 4):
            self.shift(-unused)

    def shift(self, columns: int) -> None:
        """Move all rows to the right, or to the left."""
        rows, begin = len(self.jobs), max(0, -columns)
        moved = slice(begin + columns, self.length + columns)
        for layer in self.cache.layers:
            for stored in layer.stored if layer.is_initialized else ():
                stored[:rows, :, moved] = stored[:rows, :, begin : self.length].clone()
        filled = self.filled[:rows, begin : self.length].clone()
        self.filled[:rows] = False
        self.filled[:rows, moved] = filled
        self.move_to(self.length + columns)

    def move_to(self, length: int) -> None:
        self.length = length
        for layer in self.cache.layers:
            layer.length = length


class Engine:
    """Answers jobs with one model, in a thread of its own. LabError for a model whose cache cannot
    be padded: a recurrent one, or one with a sliding window."""

    def __init__(self, model: nn.Module, task: Answered, most_rows: int = 64) -> None:
        self.model, self.most_rows = model, most_rows
        self.end, self.vocabulary = task.end, task.vocabulary
        # A few more than a row needs, so that rows need not be moved at each step; many more would
        # spread those that are filled over more memory.
        self.columns = task.longest_row + SPARE
        cache = DynamicCache(config=model.config)
        if not all(type(layer) is DynamicLayer for layer in cache.layers):
            raise LabError(
                f"a model of architecture {model.config.model_type} cannot be served: its rows "
                "cannot be answered together; use one with plain attention, such as llama"
            )
        self.layers = len(cache.layers)
        self.waiting: queue.SimpleQueue[Job | Score | None] = queue.SimpleQueue()
        self.backlog: list[Job] = []
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def submit(self, job: Job | Score) -> None:
        self.waiting.put(job)

    def close(self) -> None:
        """Stop after the current step; jobs that are not done end without an answer."""
        self.waiting.put(None)
        self.thread.join()

    def run(self) -> None:
        batch = Batch(self.layers, self.most_rows, self.columns)
        while True:
            joining = self.joining(len(batch.jobs))
            if joining is None:
                for job in batch.jobs:
                    job.deliver(None)
                return
            try:
                for alike in of_similar_length(joining):
                    self.begin(batch, alike)
                if batch.jobs:
                    self.advance(batch)
            except Exception as error:  # the others that wait are answered all the same
                for job in {*joining, *batch.jobs}:
                    job.deliver(error)
                batch = Batch(self.layers, self.most_rows, self.columns)

    def joining(self, answered: int) -> list[Job] | None:
        """The jobs that join before the next step: the one that has waited longest, and those whose
        prompts are about as long; waits for one if nothing is being answered. None to stop."""
        room = self.most_rows - answered
        if not self.receive(block=not answered and not self.backlog):
            for job in self.backlog:
                job.deliver(None)
            return None
        for job in (job for job in self.backlog if job.cancelled):
            job.deliver(None)
        self.backlog = [job for job in self.backlog if not job.cancelled]
        # Reading many prompts at once takes less than a few each time.
        if not self.backlog or room < self.most_rows // ROOM:
            return []
        length = len(self.backlog[0].prompt)
        order = sorted(
            range(len(self.backlog)), key=lambda i: abs(len(self.backlog[i].prompt) - length)
        )
        chosen = set(order[:room])
        found = [job for i, job in enumerate(self.backlog) if i in chosen]
        self.backlog = [job for i, job in enumerate(self.backlog) if i not in chosen]
        return found

    def receive(self, block: bool) -> bool:
        """Take what has arrived; scores are answered at once. False to stop."""
        while True:
            try:
                job = self.waiting.get(block=block)
            except queue.Empty:
                return True
            if job is None:
                return False
            if isinstance(job, Score):
                job.deliver(self.scored_or_error(job))
            else:
                self.backlog.append(job)
                block = False

    def scored_or_error(self, job: Score) -> Tensor | Exception:
        try:
            return self.scored(job.tokens, job.watermark)
        except Exception as error:
            return error

    @torch.no_grad()
    def scored(self, tokens: list[int], watermark: Watermark | None) -> Tensor:
        ids = torch.tensor([tokens], device=device_of(self.model))
        logits = self.model(ids, use_cache=False).logits[0, :-1, : self.vocabulary]
        log_probs = torch.log_softmax(logits.float().cpu(), dim=-1)
        if watermark:
            log_probs = watermark.raised(log_probs, torch.tensor(tokens[:-1]))
        return log_probs

    @torch.no_grad()
    def begin(self, batch: Batch, jobs: list[Job]) -> None:
        """Read the prompts but for their last token, which the next step reads."""
        length = max(len(job.prompt) for job in jobs)
        tokens = torch.zeros((len(jobs), length), dtype=torch.long)
        filled = torch.zeros((len(jobs), length), dtype=torch.bool)
        for row, job in enumerate(jobs):
            tokens[row, length - len(job.prompt) :] = torch.tensor(job.prompt)
            filled[row, length - len(job.prompt) :] = True
        cache = DynamicCache(config=self.model.config)
        if length > 1:
            self.forward(tokens[:, :-1], filled[:, :-1], cache)
        batch.add(jobs, cache, filled[:, :-1], tokens[:, -1])

    @torch.no_grad()
    def advance(self, batch: Batch) -> None:
        """Every row of the batch one token longer, without those that are done."""
        batch.make_room()
        rows = len(batch.jobs)
        batch.filled[:rows, batch.length] = True
        filled = batch.filled[:rows, : batch.length + 1]
        logits = self.forward(batch.last[:rows, None], filled, batch.cache)
        batch.length += 1
        log_probs = distribution(logits[:, -1, : self.vocabulary].float().cpu(), batch.jobs)
        likeliest = log_probs.argmax(-1).tolist()
        chosen = [
            token if job.temperature == 0 else draw(row, job)
            for token, row, job in zip(likeliest, log_probs, batch.jobs, strict=True)
        ]
        batch.last[:rows] = torch.tensor(chosen)
        done = []
        for row, (job, token) in enumerate(zip(batch.jobs, chosen, strict=True)):
            job.tokens.append(token)
            if not job.cancelled:
                job.deliver((token, log_probs[row] if job.wants_log_probs else None))
            if job.cancelled or token == self.end or len(job.tokens) == job.longest:
                job.deliver(None)
                done.append(row)
        batch.drop(done)

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


def of_similar_length(jobs: list[Job]) -> Iterator[list[Job]]:
    """Jobs in groups in which their prompts are padded by few tokens: reading many of these takes
    longer than one more pass. The longest come first, so that the others fit."""
    group: list[Job] = []
    padding = 0
    for job in sorted(jobs, key=lambda job: -len(job.prompt)):
        padding += len(group[0].prompt) - len(job.prompt) if group else 0
        if padding > MOST_PADDING:
            yield group
            group, padding = [], 0
        group.append(job)
    if group:
        yield group


def distribution(logits: Tensor, jobs: list[Job]) -> Tensor:
    """[B, V] log-probabilities that the tokens are drawn from: after the bias, the temperature, the
    top_p and the watermark of each job. At temperature 0 they are those of temperature 1."""
    for row, job in enumerate(jobs):
        for token, bias in job.bias.items():
            logits[row, token] += bias
    temperature = torch.tensor([job.temperature or 1.0 for job in jobs])
    log_probs = torch.log_softmax(logits / temperature[:, None], dim=-1)
    rows = [row for row, job in enumerate(jobs) if job.top_p < 1]
    if rows:
        log_probs[rows] = nucleus(log_probs[rows], torch.tensor([jobs[row].top_p for row in rows]))
    marked: dict[Watermark, list[int]] = {}
    for row, job in enumerate(jobs):
        if job.watermark:
            marked.setdefault(job.watermark, []).append(row)
    for watermark, rows in marked.items():
        last = torch.tensor([(jobs[row].tokens or jobs[row].prompt)[-1] for row in rows])
        log_probs[rows] = watermark.raised(log_probs[rows], last)
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
    cumulative = log_probs.double().exp().cumsum(-1)
    point = torch.rand((), generator=job.generator, dtype=torch.float64) * cumulative[-1]
    return int(torch.searchsorted(cumulative, point, right=True).clamp(max=len(log_probs) - 1))
