"""A needle that shares no word with its question."""

import random
from dataclasses import dataclass

from topmass.eval.tasks.base import Filler, Haystack, Question, Task, scatter
from topmass.eval.tasks.words import FIELDS, INSTRUMENTS, NAMES

__all__ = ["LatentAssociation"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAssociation(Task):
    """Twelve people each own a thing; the question names a field, and whoever owns the thing of that field is the answer.

    Matching words does not help: the reader must know that a sextant belongs to astronomy. Chance is 1/12 for a guesser who
    names any of the people.
    """

    name: str = "latent_association"
    filler: str | None = "prose"
    max_new_tokens: int = 8
    max_questions: int = 8
    min_size: int = 16
    people: int = 12

    def build(self, rng: random.Random, size: int, filler: Filler) -> Haystack:
        """A haystack of `size` units."""
        people, fields = rng.sample(NAMES, self.people), rng.sample(FIELDS, self.people)
        facts = [f"{who} owns the {rng.choice(INSTRUMENTS[field])}." for who, field in zip(people, fields, strict=True)]
        units, places = scatter(rng, facts, size, filler)
        asked = [
            Question(text=f"Question: Who is in {fields[i]}?\nAnswer:", answer=people[i], references=(people[i],), after=places[i] + 1)
            for i in rng.sample(range(self.people), self.max_questions)
        ]  # fmt: skip
        return Haystack(units=units, questions=tuple(asked))
