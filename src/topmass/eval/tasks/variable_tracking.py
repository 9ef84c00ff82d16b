"""Follow a value through assignments."""

import random
from dataclasses import dataclass

from topmass.eval.tasks.base import Filler, Haystack, Question, Task, scatter
from topmass.eval.tasks.needles import digits
from topmass.eval.tasks.words import NOUNS

__all__ = ["VariableTracking"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VariableTracking(Task):
    """A value is given to a name, from there to another, two to four times; all names that hold it are wanted, in that order.

    The other chains of the haystack distract. Chance is 0, or about one in the number of chains for a guesser who knows
    which names form a chain. Scored by the share of the names found.
    """

    name: str = "variable_tracking"
    filler: str | None = "noise"
    max_new_tokens: int = 32
    max_questions: int = 6
    min_size: int = 36
    chains: int = 6
    names: tuple[int, int] = (3, 5)

    def build(self, rng: random.Random, size: int, filler: Filler) -> Haystack:
        """A haystack of `size` units."""
        lengths = [rng.randint(*self.names) for _ in range(self.chains)]
        names = iter(rng.sample(NOUNS, sum(lengths)))
        chains = [[next(names) for _ in range(n)] for n in lengths]
        values = [digits(rng, 5) for _ in chains]
        order = [i for i, n in enumerate(lengths) for _ in range(n)]
        rng.shuffle(order)
        done, facts = [0] * self.chains, []
        for i in order:
            source = chains[i][done[i] - 1] if done[i] else values[i]
            facts.append(f"Let {chains[i][done[i]]} be {source}.")
            done[i] += 1
        units, places = scatter(rng, facts, size, filler)
        last = {i: places[at] + 1 for at, i in enumerate(order)}
        asked = [_ask(chains[i], values[i], last[i]) for i in rng.sample(range(self.chains), self.chains)]
        return Haystack(units=units, questions=tuple(asked))


def _ask(chain: list[str], value: str, after: int) -> Question:
    text = f"Question: Which names are {value}, in the order of the text?\nAnswer:"
    return Question(text=text, answer=" ".join(chain), references=tuple(chain), after=after)
