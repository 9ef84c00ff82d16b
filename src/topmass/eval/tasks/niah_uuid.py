"""A needle whose key and value mean nothing."""

import random
from dataclasses import dataclass

from topmass.eval.tasks.base import Filler, Haystack, Question, Task, scatter

__all__ = ["NiahUuid"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NiahUuid(Task):
    """Find a random identifier and copy the random identifier beside it; every twelfth sentence or so is such a pair.

    Chance is 0: there are 16**6 identifiers.
    """

    name: str = "niah_uuid"
    filler: str | None = "noise"
    max_new_tokens: int = 32
    max_questions: int = 8
    min_size: int = 12
    share: float = 1 / 12

    def build(self, rng: random.Random, size: int, filler: Filler) -> Haystack:
        """A haystack of `size` units."""
        n = max(self.max_questions, round(size * self.share))
        keys = [_identifier(rng) for _ in range(n)]
        values = [_identifier(rng) for _ in range(n)]
        facts = [f"Entry {k} points to {v}." for k, v in zip(keys, values, strict=True)]
        units, places = scatter(rng, facts, size, filler)
        asked = [
            Question(text=f"Question: Where does entry {keys[i]} point to?\nAnswer:", answer=values[i], references=(values[i],), after=places[i] + 1)
            for i in rng.sample(range(n), self.max_questions)
        ]  # fmt: skip
        return Haystack(units=units, questions=tuple(asked))


def _identifier(rng: random.Random) -> str:
    a, b = f"{rng.randrange(16**3):03x}", f"{rng.randrange(16**3):03x}"
    return f"{a}-{b}"
