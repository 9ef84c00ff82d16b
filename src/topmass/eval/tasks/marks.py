"""Marks such as "Mara: heron." to be counted, shared by the aggregation tasks.

One token in fifteen decides a question, all over the context. Up to 8,000 tokens whoever reads a tenth of the deciding marks
errs in a quarter of the questions or more, whoever reads all of them cannot. The winner's lead grows as the square root of
the marks up to some 6,000 tokens and in proportion to them from there on, so that a share of them tells ever more: at 64,000
tokens a tenth errs in one question of fifty at most.
"""

import random

from topmass.eval.tasks.base import Filler

__all__ = ["counts", "lay_out"]

SAMPLED = 1 / 8  # the share of the marks that a budget of 1/128 of the context can hold
LEAST = 0.75  # a winner leads by this share of the average, however long the context
PROSE = 0.2  # sentences of prose among all units: a little less than half of the tokens


def counts(rng: random.Random, total: int, options: int, *, winners: int = 1, lead: float) -> list[int]:
    """How often each option is marked, winners first, in falling order; every winner leads all losers by two or more.

    Args:
        lead: The last winner's lead over a loser, in standard errors of their difference among the sampled marks; more where
            `LEAST` asks for more, less where the marks are too few for it.
    """
    ahead = max(2, round(lead * (2 * total / options / SAMPLED) ** 0.5), round(LEAST * total / options))
    step = max(1, ahead // 2) if winners > 1 else 0
    while ahead > 2 and winners * ahead + step * winners * (winners - 1) // 2 > 0.8 * total:
        ahead -= 1
        step = max(1, ahead // 2) if winners > 1 else 0
    won = winners * (ahead + 1) + step * winners * (winners - 1) // 2
    base, rest = divmod(max(total - won, 0), options)
    losers = [base + (i < rest) for i in range(options - winners)]
    rng.shuffle(losers)
    return [base + 1 + ahead + step * (winners - 1 - i) for i in range(winners)] + losers


def lay_out(rng: random.Random, marks: list[str], size: int, filler: Filler) -> tuple[str, ...]:
    """Shuffle the marks among sentences of filler."""
    units = marks + [filler(rng) for _ in range(size - len(marks))]
    rng.shuffle(units)
    return tuple(units)
