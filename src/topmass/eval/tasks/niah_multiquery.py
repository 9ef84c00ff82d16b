"""Several keys in one question."""

import random
from dataclasses import dataclass

from topmass.eval.tasks.base import Filler, Haystack, Question, Task, scatter
from topmass.eval.tasks.needles import code, draw_keys, needle

__all__ = ["NiahMultiquery"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NiahMultiquery(Task):
    """The codes of three keys are asked for at once, in the order of the question.

    Chance is 0. Scored by the share of the three values found, in whatever order.
    """

    name: str = "niah_multiquery"
    filler: str | None = "prose"
    max_new_tokens: int = 32
    max_questions: int = 4
    min_size: int = 16
    needles: int = 12

    def build(self, rng: random.Random, size: int, filler: Filler) -> Haystack:
        """A haystack of `size` units."""
        keys = draw_keys(rng, self.needles)
        values = [code(rng) for _ in keys]
        units, places = scatter(rng, [needle(k, v) for k, v in zip(keys, values, strict=True)], size, filler)
        order = rng.sample(range(self.needles), self.needles)
        asked = [_ask(keys, values, places, order[i : i + 3]) for i in range(0, self.needles - 2, 3)]
        return Haystack(units=units, questions=tuple(asked))


def _ask(keys: list[str], values: list[str], places: list[int], three: list[int]) -> Question:
    a, b, c = (keys[i] for i in three)
    found = tuple(values[i] for i in three)
    text = f"Question: What are the codes of the {a}, the {b} and the {c}?\nAnswer:"
    return Question(text=text, answer=", ".join(found), references=found, after=max(places[i] for i in three) + 1)
