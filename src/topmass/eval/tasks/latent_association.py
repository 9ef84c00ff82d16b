"""A needle that shares no word with its question."""

import random
from dataclasses import dataclass

from topmass.eval.tasks.base import Filler, Haystack, Question, Task, scatter
from topmass.eval.tasks.needles import code, needle
from topmass.eval.tasks.words import FIELDS, INSTRUMENTS

__all__ = ["LatentAssociation"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAssociation(Task):
    """Twelve things each have a code; the question names a field, and the code of the thing of that field is wanted.

    Needle and question share no word: the reader must know that a sextant belongs to astronomy. Chance is 1/12 for a
    guesser who names any of the codes.
    """

    name: str = "latent_association"
    filler: str | None = "prose"
    max_new_tokens: int = 32
    max_questions: int = 8
    min_size: int = 16
    things: int = 12

    def build(self, rng: random.Random, size: int, filler: Filler) -> Haystack:
        """A haystack of `size` units."""
        fields, values = rng.sample(FIELDS, self.things), [code(rng) for _ in range(self.things)]
        facts = [needle(rng.choice(INSTRUMENTS[field]), v) for field, v in zip(fields, values, strict=True)]
        units, places = scatter(rng, facts, size, filler)
        asked = [
            Question(
                text=f"Question: Which number belongs to {fields[i]}?\nAnswer:",
                answer=values[i], references=(values[i],), after=places[i] + 1,
            )
            for i in rng.sample(range(self.things), self.max_questions)
        ]  # fmt: skip
        return Haystack(units=units, questions=tuple(asked))
