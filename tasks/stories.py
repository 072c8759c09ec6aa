"""The task `stories`: a pretrained teacher writes short stories to prompts made from word lists,
as in Eldan and Li 2023 (TinyStories), arXiv 2305.07759, section 2.

Nobody wrote these stories before, so a model that no teacher taught learns from other text: the
chapters of the World English Bible, or `documents`.
"""

from collections.abc import Iterator
from functools import cached_property

import numpy as np
from pydantic import Field

from configs.schema import Section
from tasks.examples import Exchange
from tasks.instruct import Instruct
from tasks.text import bible_file, read_packaged, vocabulary_field

TRAITS = (
    "brave curious hungry lonely lazy clever shy old tiny noisy patient clumsy proud sleepy kind "
    "careless"
).split()
CHARACTERS = (
    "fox|crow|girl|boy|farmer|baker|sailor|hen|frog|robot|wizard|queen|painter|bear|hare|doctor|"
    "owl|teacher|goat|tailor|mouse|giant|miner|nurse|pilot|cook|dragon|beggar|twin|neighbour"
).split("|")
THINGS = (
    "a broken kite|a golden key|an old map|a red boat|a silver bell|a talking clock|a lost letter|"
    "a wooden drum|a strange seed|a small lamp|a torn coat|a stolen crown|a glass bottle|"
    "a heavy stone|a blue feather|a hidden door|a warm blanket|an empty well|a paper bridge|"
    "a forgotten song|a bag of salt|a rusty bicycle|a tall ladder|a jar of honey"
).split("|")
PLACES = (
    "in a quiet village|on a windy hill|at the bottom of the sea|in a crowded market|on a long "
    "train ride|in a dark forest|near a frozen lake|on a lonely island|in an old castle|under a "
    "bridge|in a school yard|on the roof of a tower|in the middle of a desert|at a night fair|"
    "in a small kitchen|on a mountain path"
).split("|")
ASKS = "Write a story of four short sentences about a {} {} and {} {}."


class Stories(Instruct):
    """Prompts from word lists, and text that no teacher wrote."""

    class Settings(Section):
        prompts: int = Field(2000, ge=60)
        documents: str | None = None  # instead of the Bible: a folder or file of text
        columns: dict[str, str] = {}
        system: str | None = None
        tokenizer: str | None = None  # the teacher's: a folder, a GGUF file or a hub id
        # At most so many of its tokens, or a file that lists those to keep
        vocabulary: int | str | None = vocabulary_field()
        row_tokens: int = Field(192, ge=64)
        answer_tokens: int = Field(112, ge=1)
        limit: int | None = Field(None, ge=60)

    name = "stories"

    @classmethod
    def objections_to_source(cls, settings: Settings) -> Iterator[str]:
        most = len(TRAITS) * len(CHARACTERS) * len(THINGS) * len(PLACES)
        if settings.prompts > most:
            yield f"prompts: found {settings.prompts}, but the word lists make {most:,}"

    def read(self) -> Iterator[Exchange]:
        """Different prompts, drawn from all that the word lists make."""
        sizes = [len(words) for words in (TRAITS, CHARACTERS, THINGS, PLACES)]
        draw = np.random.Generator(np.random.PCG64(0))
        for number in draw.permutation(np.prod(sizes))[: self.settings.prompts]:
            trait, character, thing, place = np.unravel_index(number, sizes)
            words = TRAITS[trait], CHARACTERS[character], THINGS[thing], PLACES[place]
            yield Exchange((("user", ASKS.format(*words)),), None)

    @cached_property
    def documents(self) -> list[str]:
        own = self.settings.documents
        return self.own_documents() if own else read_packaged(bible_file())

    @property
    def data_licence(self) -> str:
        own = self.settings.documents
        return "" if own else "the World English Bible (public domain), or answers of its teacher"
