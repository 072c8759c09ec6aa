"""The task `pronounce`: spelled English words to phonemes.

Source: the CMU Pronouncing Dictionary (Carnegie Mellon University, BSD licence), as the
pocketsphinx package ships it, without stress marks. A row reads `distill = D IH S T IH L`;
the prompt ends with the `=`. Training uses a word's first listed pronunciation, the grader
accepts any.
"""

import hashlib
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from pydantic import Field
from rapidfuzz.distance import Levenshtein
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from configs.schema import LabError, Section
from models.rows import Rows, row_id
from tasks.packaged import packaged_file, read_verified
from tasks.task import Metric, Task

SHA256 = "20b5c293e1f311fb375fe067e500ec5636f4fc7af5594967263696def9b23bfe"
LETTERS = "abcdefghijklmnopqrstuvwxyz'-."
PHONEMES = (
    "AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH UW V "
    "W Y Z ZH"
).split()
SPECIALS = ["<pad>", "<s>", "</s>", "="]
LONG = 14  # words of at least this many letters are never trained on
SPLITS = ("train", "validation", "heldout", "long")
LONGEST_PROMPT = 32  # tokens; the longest word has 28 letters
LONGEST_ANSWER = 40  # tokens; the longest listed pronunciation has 27


def split_of(word: str) -> str:
    """train, validation, heldout (90/5/5) or long, by a hash of the word: the same everywhere."""
    if len(word) >= LONG:
        return "long"
    bucket = int.from_bytes(hashlib.sha256(f"split {word}".encode()).digest()[:8], "big") % 100
    return "train" if bucket < 90 else "validation" if bucket < 95 else "heldout"


def dictionary_file() -> Path:
    return packaged_file("pocketsphinx", "the dictionary", "model", "en-us", "cmudict-en-us.dict")


def read_dictionary(file: Path) -> dict[str, list[str]]:
    """word -> its pronunciations, in their listed order. LabError if it is another dictionary."""
    content = read_verified(file, SHA256, is_text=True)
    words: dict[str, list[str]] = {}
    for line in content.decode("utf-8").splitlines():
        word, phonemes = line.split(maxsplit=1)
        pronunciations = words.setdefault(re.sub(r"\(\d+\)$", "", word), [])
        if phonemes not in pronunciations:
            pronunciations.append(phonemes)
    return words


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per letter and per phoneme, 72 in all. Letters are lower case, phonemes upper."""
    vocabulary = {token: i for i, token in enumerate([*SPECIALS, *LETTERS, *PHONEMES])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex(r"[A-Z]+|[a-z'.\-]|="), "isolated"),
        ]
    )
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


class Pronounce(Task):
    """Rows, tokenizer and grader."""

    class Settings(Section):
        limit: int | None = Field(None, ge=100)  # a random subset of words, for tests

    name = "pronounce"
    item_noun = "words"
    examples = ("deepseek", "distillation")
    familiar = ("lead", "ballet", "knife", "spaghetti", "invalid", "plateau", "ocean", "thousand")
    package = "pocketsphinx"
    evaluation_splits = ("heldout", "long")
    metrics = {
        "word_error_rate": Metric(
            "word errors", "%", True, "wrong",
            meaning="words whose pronunciation is none of those listed",
        ),
        "phoneme_error_rate": Metric(
            "phoneme errors", "%", True, "edits", "length",
            meaning="edits to the nearest listed pronunciation, per phoneme of it",
        ),
        "far_word_error_rate": Metric(
            "errors on far words", "%", True, "wrong_far", "far",
            meaning="word errors among the words at an edit distance of 2 and more from every "
            "training word",
        ),
    }  # fmt: skip
    headline = "word_error_rate"
    table = (
        "word_error_rate",
        "phoneme_error_rate",
        "sequence_agreement",
        "agreement_on_teacher_errors",
        "kl_teacher_student",
    )
    invents_prompts = True
    longest_answer = LONGEST_ANSWER
    longest_row = LONGEST_PROMPT + LONGEST_ANSWER  # positions a model must have

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.words = read_dictionary(dictionary_file())
        if self.settings.limit:
            keep = sorted(self.words, key=row_id)[: self.settings.limit]
            self.words = {word: self.words[word] for word in sorted(keep)}
        self.tokenizer = build_tokenizer()
        self.token_ids = {token: i for token, i in self.tokenizer.get_vocab().items()}
        self.tokens = sorted(self.token_ids, key=self.token_ids.get)
        self.separator = self.token_ids["="]

    def token_name(self, token: int) -> str:
        return self.tokens[token]

    @cached_property
    def by_split(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {split: [] for split in SPLITS}
        for word in self.words:
            found[split_of(word)].append(word)
        return found

    @cached_property
    def by_id(self) -> dict[int, str]:
        return {self.id_of(word): word for word in self.words}

    @cached_property
    def near_words(self) -> set[str]:
        """The evaluation words that are one letter inserted, deleted or replaced from a training
        word."""
        training = set(self.by_split["train"])
        tested = (word for name in SPLITS if name != "train" for word in self.by_split[name])
        return {word for word in tested if not training.isdisjoint(one_edit_away(word))}

    def id_of(self, word: str) -> int:
        return row_id(f"pronounce {word}")

    def dataset(self, split: str) -> datasets.Dataset:
        """The split as text: columns id, prompt, completion."""
        words = self.by_split[split]
        return datasets.Dataset.from_dict(
            {
                "id": [self.id_of(word) for word in words],
                "prompt": [f"{word} =" for word in words],
                "completion": [self.words[word][0] for word in words],
            }
        )

    def rows(self, split: str) -> Rows:
        """The split as tokens: prompt `<s> letters =`, completion `phonemes </s>`."""
        table = self.dataset(split)
        ends = [self.tokenizer.eos_token_id]
        return Rows.build(
            table["id"][:],
            [self.prompt(prompt.removesuffix(" =")) for prompt in table["prompt"][:]],
            [
                [self.token_ids[p] for p in answer.split()] + ends
                for answer in table["completion"][:]
            ],
        )

    @property
    def data_licence(self) -> str:
        return "the CMU Pronouncing Dictionary (BSD, two clauses)"

    def prompt(self, word: str) -> list[int]:
        """`lab` -> the ids of `<s> l a b =`. LabError for a letter without a token."""
        word = word.lower()
        if not 1 <= len(word) <= LONGEST_PROMPT - 2:
            start = word if len(word) < 50 else f"{word[:20]}..."
            raise LabError(f"{start!r} has {len(word)} letters, expected 1 to {LONGEST_PROMPT - 2}")
        for letter in word:
            if letter not in LETTERS:
                raise LabError(f"{word!r}: {letter!r} is not one of the letters {LETTERS}")
        spelled = [self.token_ids[letter] for letter in word]
        return [self.tokenizer.bos_token_id, *spelled, self.separator]

    def invented_prompt_length(self, row: np.ndarray) -> int | None:
        """The length of the prompt in a row that a teacher invented. None if the row is not
        `<s> letters = phonemes </s>`, or if its word belongs to an evaluation split."""
        tokens = [self.tokens[t] for t in row]
        if tokens.count("=") != 1 or tokens[-1] != "</s>":
            return None
        end = tokens.index("=")
        letters, phonemes = tokens[1:end], tokens[end + 1 : -1]
        word = "".join(letters)
        known = set(letters) <= set(LETTERS) and set(phonemes) <= set(PHONEMES)
        unseen = split_of(word) == "long" or (word in self.words and split_of(word) != "train")
        return None if unseen or not (known and letters and phonemes) else end + 1

    def question(self, rows: Rows, i: int) -> str:
        """The word that row i asks about."""
        return "".join(self.tokens[t] for t in rows.prompt(i)[1:-1])

    def truths(self, question: str) -> list[str]:
        """The listed pronunciations."""
        return self.words.get(question.lower(), [])

    def encode_answer(self, text: str) -> list[int]:
        unknown = [word for word in text.split() if word not in self.token_ids]
        if unknown:
            raise LabError(f"{unknown[0][:20]!r} is no token of task {self.name}")
        return [self.token_ids[word] for word in text.split()]

    def render(self, tokens: np.ndarray | list[int]) -> str:
        """Answer tokens as text, up to EOS."""
        words = [self.tokens[t] for t in tokens]
        return " ".join(words[: words.index("</s>")] if "</s>" in words else words)

    def grade(self, ids: np.ndarray, answers: list[str]) -> dict[str, np.ndarray]:
        """Per row: wrong (0/1), edits to the nearest listed pronunciation, and its length; far from
        the training words (0/1), and wrong there."""
        wrong = np.zeros(len(ids))
        edits = np.zeros(len(ids))
        length = np.zeros(len(ids))
        for i, (word_id, answer) in enumerate(zip(ids, answers, strict=True)):
            phonemes = answer.split()
            listed = [listed.split() for listed in self.words[self.by_id[int(word_id)]]]
            distances = [Levenshtein.distance(phonemes, reference) for reference in listed]
            best = int(np.argmin(distances))
            wrong[i], edits[i], length[i] = distances[best] > 0, distances[best], len(listed[best])
        words = (self.by_id[int(word_id)] for word_id in ids)
        far = np.array([word not in self.near_words for word in words], float)
        return {
            "wrong": wrong,
            "edits": edits,
            "length": length,
            "far": far,
            "wrong_far": wrong * far,
        }


def one_edit_away(word: str) -> Iterator[str]:
    """The word itself, and every word one letter inserted, deleted or replaced from it."""
    yield word
    for i in range(len(word) + 1):
        before, after = word[:i], word[i:]
        for letter in LETTERS:
            yield before + letter + after
            if after:
                yield before + letter + after[1:]
        if after:
            yield before + after[1:]
