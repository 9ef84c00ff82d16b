"""The word that someone says most often."""

import random
from dataclasses import dataclass

from topmass.eval.tasks.base import Filler, Haystack, Question, Task
from topmass.eval.tasks.marks import PROSE, counts, lay_out
from topmass.eval.tasks.words import NAMES, NOUNS

__all__ = ["CommonWords"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CommonWords(Task):
    """Two people say the same eight words, each with a favourite; the question names the person.

    Chance is 1/8: counting needs the speaker of every word. One word, and its first token decides; one token in sixteen counts.
    """

    name: str = "common_words"
    filler: str | None = "prose"
    max_new_tokens: int = 32
    max_questions: int = 2
    min_size: int = 60
    speakers: int = 2
    words: int = 8
    prose: float = PROSE
    lead: float = 1.4

    def build(self, rng: random.Random, size: int, filler: Filler) -> Haystack:
        """A haystack of `size` units."""
        each = int(size * (1 - self.prose) / self.speakers)
        words, marks, asked = rng.sample(NOUNS, self.words), [], []
        for who in rng.sample(NAMES, self.speakers):
            said = rng.sample(words, len(words))
            tally = counts(rng, each, len(said), lead=self.lead)
            marks += [f"{who}: {w}." for w, n in zip(said, tally, strict=True) for _ in range(n)]
            text = f"Question: Which word did {who} say most often?\nAnswer:"
            asked.append(Question(text=text, answer=said[0], references=(said[0],), after=size))
        return Haystack(units=lay_out(rng, marks, size, filler), questions=tuple(asked))
