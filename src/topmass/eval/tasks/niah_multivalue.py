"""All values of one key."""

import random
from dataclasses import dataclass

from topmass.eval.tasks.base import Filler, Haystack, Question, Task, scatter
from topmass.eval.tasks.needles import code, draw_keys

__all__ = ["NiahMultivalue"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NiahMultivalue(Task):
    """Four needles, first to fourth, share a key and all four values are wanted, in that order.

    Chance is 0. Scored by the share of the four values found, in whatever order.
    """

    name: str = "niah_multivalue"
    filler: str | None = "prose"
    max_new_tokens: int = 32
    max_questions: int = 4
    min_size: int = 20
    keys: int = 4
    values: int = 4

    def build(self, rng: random.Random, size: int, filler: Filler) -> Haystack:
        """A haystack of `size` units."""
        keys = draw_keys(rng, self.keys)
        order = [(key, i) for key in keys for i in range(self.values)]
        rng.shuffle(order)
        value = {which: code(rng) for which in order}
        facts = [f"The {_ORDINALS[i]} code of the {key} is {value[key, i]}." for key, i in order]
        units, places = scatter(rng, facts, size, filler)
        asked = []
        for key in keys:
            found = tuple(value[key, i] for i in range(self.values))
            text = f"Question: What are all the codes of the {key}, first to {_ORDINALS[self.values - 1]}?\nAnswer:"
            after = 1 + max(place for place, (owner, _) in zip(places, order, strict=True) if owner == key)
            asked.append(Question(text=text, answer=", ".join(found), references=found, after=after))
        return Haystack(units=units, questions=tuple(asked))


_ORDINALS = ("first", "second", "third", "fourth")
