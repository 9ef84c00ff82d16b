"""The three most frequent words of a place."""

import random
from dataclasses import dataclass

from topmass.eval.tasks.base import Filler, Haystack, Question, Task
from topmass.eval.tasks.marks import PROSE, counts, lay_out
from topmass.eval.tasks.words import NOUNS, PLACES

__all__ = ["FrequentWords"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FrequentWords(Task):
    """Which three of sixteen words are heard most often at a place, the most frequent first.

    Chance is 3/16 for a guesser who knows the place's words. Scored by the share of the three found, in whatever order. Two
    places have words of their own; a question is decided by one token in sixteen.
    """

    name: str = "frequent_words"
    filler: str | None = "prose"
    max_new_tokens: int = 32
    max_questions: int = 2
    min_size: int = 100
    places: int = 2
    words: int = 16
    prose: float = PROSE
    lead: float = 1.0

    def build(self, rng: random.Random, size: int, filler: Filler) -> Haystack:
        """A haystack of `size` units."""
        each = int(size * (1 - self.prose) / self.places)
        words, marks, asked = iter(rng.sample(NOUNS, self.words * self.places)), [], []
        for place in rng.sample(PLACES, self.places):
            heard = [next(words) for _ in range(self.words)]
            tally = counts(rng, each, len(heard), winners=3, lead=self.lead)
            marks += [f"{place}: {w}." for w, n in zip(heard, tally, strict=True) for _ in range(n)]
            text = f"Question: Which three words were heard most often at {place}?\nAnswer:"
            asked.append(Question(text=text, answer=" ".join(heard[:3]), references=tuple(heard[:3]), after=size))
        return Haystack(units=lay_out(rng, marks, size, filler), questions=tuple(asked))
