"""The answers that an endpoint was paid for, and what may still be spent."""

import sqlite3
import threading
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load, save

from configs.schema import LabError
from teacher.offer import Offer
from teacher.signal import LOG_ZERO

OVERHEAD = 64  # tokens that a server's chat template may add to a prompt


@dataclass(frozen=True)
class Answer:
    """An answer of n tokens of the student, and m log-probabilities that were revealed at each:
    tokens [n]; log_probs [n, m] of the outcomes in indices [n, m]. m is 0 for text alone; n is 0
    for an answer that the task cannot read."""

    tokens: np.ndarray
    indices: np.ndarray
    log_probs: np.ndarray

    @classmethod
    def of(cls, tokens: list[int], revealed: list[dict[int, float]]) -> "Answer":
        """revealed: {outcome: log-probability} at each token; where there are fewer than elsewhere,
        the first is repeated."""
        most = max(map(len, revealed), default=0)
        padded = [[*pairs.items()] for pairs in revealed]
        padded = [pairs + pairs[:1] * (most - len(pairs)) for pairs in padded]
        found = np.array(padded, np.float64).reshape(len(tokens), most, 2)
        return cls(
            np.array(tokens, np.int64),
            found[..., 0].astype(np.int32),
            found[..., 1].astype(np.float32),
        )

    def packed(self) -> bytes:
        return save(vars(self))

    @classmethod
    def unpacked(cls, content: bytes) -> "Answer":
        return cls(**load(content))

    def distribution(self, count: int, vocabulary: int) -> torch.Tensor:
        """Log-probabilities [count, V] at the first tokens. The outcomes that were not revealed
        share the remaining probability evenly."""
        indices, log_probs = (
            torch.from_numpy(values[:count].copy()) for values in (self.indices, self.log_probs)
        )
        known = torch.zeros((count, vocabulary), dtype=torch.bool)
        known.scatter_(-1, indices.long(), True)
        dense = torch.zeros((count, vocabulary), dtype=torch.float64)
        dense.scatter_(-1, indices.long(), log_probs.double().exp())
        dense /= dense.sum(-1, keepdim=True).clamp_min(1)  # servers that round can show more than 1
        rest = (1 - dense.sum(-1)).clamp_min(0) / (~known).sum(-1).clamp_min(1)
        shared = torch.where(known, dense, rest[:, None])
        return shared.log().clamp_min(LOG_ZERO).float()


class Journal:
    """The answers that were paid for, in a SQLite file: by row id, what the endpoint returned.
    seller: which teacher answers. LabError if the file has answers of another one."""

    def __init__(self, file: Path, seller: str = "") -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self.database = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
        self.database.execute("PRAGMA journal_mode = WAL")
        self.database.execute("PRAGMA synchronous = NORMAL")
        self.database.execute(
            "CREATE TABLE IF NOT EXISTS answers (id INTEGER PRIMARY KEY, prompt_tokens INTEGER, "
            "completion_tokens INTEGER, content BLOB)"
        )
        self.database.execute("CREATE TABLE IF NOT EXISTS sellers (name TEXT)")
        known = self.database.execute("SELECT name FROM sellers").fetchone()
        if known is None:
            self.database.execute("INSERT INTO sellers VALUES (?)", (seller,))
        elif known[0] != seller:
            self.database.close()
            raise LabError(
                f"{file} holds answers of another teacher, or under other terms; move it elsewhere "
                "and run train.py on the config again"
            )
        self.lock = threading.Lock()

    def add(self, row: int, usage: tuple[int, int], answer: "Answer") -> None:
        with self.lock:
            self.database.execute(
                "INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?)", (row, *usage, answer.packed())
            )

    def get(self, row: int) -> "Answer | None":
        with self.lock:
            found = self.database.execute(
                "SELECT content FROM answers WHERE id = ?", (row,)
            ).fetchone()
        return Answer.unpacked(found[0]) if found else None

    def set_aside(self, rows: list[int]) -> None:
        """Ask these rows again; what they have cost stays in the totals."""
        with self.lock:
            for row in rows:
                self.database.execute(
                    "UPDATE answers SET id = (SELECT MIN(id, -1) - 1 FROM answers ORDER BY id "
                    "LIMIT 1) WHERE id = ?", (row,),
                )  # fmt: skip

    def totals(self) -> tuple[int, int, int]:
        """Requests, prompt tokens and completion tokens."""
        with self.lock:
            return self.database.execute(
                "SELECT COUNT(*), COALESCE(SUM(prompt_tokens), 0), "
                "COALESCE(SUM(completion_tokens), 0) FROM answers"
            ).fetchone()


@dataclass
class Spending:
    """What has been spent, and what requests in flight may spend, of a budget in tokens and in
    money; None is unlimited."""

    offer: Offer
    most_tokens: int | None
    most_money: float | None
    requests: int
    prompt_tokens: int
    completion_tokens: int
    overhead: int = OVERHEAD
    reserved: dict[int, tuple[int, int]] = field(default_factory=dict)

    @property
    def money(self) -> float:
        return self.offer.money(self.prompt_tokens, self.completion_tokens)

    def reserve(self, row: int, prompt: int, longest: int) -> bool:
        """Whether the budget holds one more request: a prompt of this many bytes, which has no more
        tokens, and an answer of this many tokens."""
        asked = [*self.reserved.values(), (prompt, longest)]
        tokens_in = self.prompt_tokens + sum(size + self.overhead for size, _ in asked)
        tokens_out = self.completion_tokens + sum(size for _, size in asked)
        money = self.offer.money(tokens_in, tokens_out)
        if self.most_tokens is not None and tokens_in + tokens_out > self.most_tokens:
            return False
        if self.most_money is not None and money > self.most_money:
            return False
        self.reserved[row] = (prompt, longest)
        return True

    def settle(self, row: int, prompt_tokens: int, completion_tokens: int) -> None:
        """An answer has arrived: what it used instead of what was reserved."""
        prompt, _ = self.reserved.pop(row)
        self.requests += 1
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens
        self.overhead = max(self.overhead, prompt_tokens - prompt)
