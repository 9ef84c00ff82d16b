"""All values of one key."""

import random
from dataclasses import dataclass

from topmass.eval.tasks.base import Filler, Haystack, Question, Task, scatter
from topmass.eval.tasks.needles import code, draw_keys, needle

__all__ = ["NiahMultivalue"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NiahMultivalue(Task):
    """Four needles have the same key and all four values are wanted, in the order of the text.

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
        owners = [k for k in draw_keys(rng, self.keys) for _ in range(self.values)]
        rng.shuffle(owners)
        values = [code(rng) for _ in owners]
        units, places = scatter(rng, [needle(k, v) for k, v in zip(owners, values, strict=True)], size, filler)
        asked = []
        for key in sorted(set(owners), key=owners.index):
            mine = [i for i, k in enumerate(owners) if k == key]
            text = (
                f"Question: What are the {_NUMBER[self.values]} codes of the {key}, in the order of the text?\nAnswer:"
            )
            found = tuple(values[i] for i in mine)
            asked.append(Question(text=text, answer=", ".join(found), references=found, after=places[mine[-1]] + 1))
        rng.shuffle(asked)
        return Haystack(units=units, questions=tuple(asked))


_NUMBER = {2: "two", 3: "three", 4: "four"}
