"""A needle among needles."""

import random
from dataclasses import dataclass

from topmass.eval.tasks.base import Filler, Haystack, Task
from topmass.eval.tasks.needles import code, draw_keys, needle, question

__all__ = ["NiahDistractor"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NiahDistractor(Task):
    """The haystack is nothing but needles of one form, with other keys that share a word with the one asked for.

    Chance is 0, or one in the number of needles for a guesser who copies any code.
    """

    name: str = "niah_distractor"
    filler: str | None = None
    max_new_tokens: int = 32
    max_questions: int = 8
    min_size: int = 8

    def build(self, rng: random.Random, size: int, filler: Filler) -> Haystack:
        """A haystack of `size` units."""
        keys = draw_keys(rng, size)
        values = [code(rng) for _ in keys]
        asked = [question(keys[i], values[i], i + 1) for i in rng.sample(range(size), min(size, self.max_questions))]
        return Haystack(units=tuple(map(needle, keys, values)), questions=tuple(asked))
