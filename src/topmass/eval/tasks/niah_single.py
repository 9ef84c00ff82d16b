"""A needle in prose."""

import random
from dataclasses import dataclass

from topmass.eval.tasks.base import Filler, Haystack, Task, scatter
from topmass.eval.tasks.needles import code, draw_keys, needle, question

__all__ = ["NiahSingle"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NiahSingle(Task):
    """Find the one sentence that answers the question; the few other needles only serve the haystack's other questions.

    Chance is 0: there are 9000 codes. One sentence holds the answer, whatever the length.
    """

    name: str = "niah_single"
    filler: str | None = "prose"
    max_new_tokens: int = 32
    max_questions: int = 8
    min_size: int = 12
    needles: int = 8

    def build(self, rng: random.Random, size: int, filler: Filler) -> Haystack:
        """A haystack of `size` units."""
        keys = draw_keys(rng, self.needles)
        values = [code(rng) for _ in keys]
        units, places = scatter(rng, [needle(k, v) for k, v in zip(keys, values, strict=True)], size, filler)
        asked = [question(k, v, p + 1) for k, v, p in zip(keys, values, places, strict=True)]
        rng.shuffle(asked)
        return Haystack(units=units, questions=tuple(asked))
