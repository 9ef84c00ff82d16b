"""Count votes."""

import random
from dataclasses import dataclass

from topmass.eval.tasks.base import Filler, Haystack, Question, Task
from topmass.eval.tasks.marks import PROSE, counts, lay_out
from topmass.eval.tasks.words import KINDS

__all__ = ["Majority"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Majority(Task):
    """Which of eight options got the most votes, all over the context; one word, and its first token decides.

    Chance is 1/8. Two kinds of things are voted on, and a question is decided by one token in sixteen.
    """

    name: str = "majority"
    filler: str | None = "prose"
    max_new_tokens: int = 32
    max_questions: int = 2
    min_size: int = 60
    kinds: int = 2
    prose: float = PROSE
    lead: float = 1.4

    def build(self, rng: random.Random, size: int, filler: Filler) -> Haystack:
        """A haystack of `size` units."""
        each = int(size * (1 - self.prose) / self.kinds)
        marks, asked = [], []
        for kind in rng.sample(sorted(KINDS), self.kinds):
            options = rng.sample(KINDS[kind], len(KINDS[kind]))
            tally = counts(rng, each, len(options), lead=self.lead)
            marks += [f"Vote: {o}." for o, n in zip(options, tally, strict=True) for _ in range(n)]
            text = f"Question: Which {kind} got the most votes?\nAnswer:"
            asked.append(Question(text=text, answer=options[0], references=(options[0],), after=size))
        return Haystack(units=lay_out(rng, marks, size, filler), questions=tuple(asked))
