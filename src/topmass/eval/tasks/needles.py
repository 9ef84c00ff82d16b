"""Needles of the form "The code of the amber lantern is 4821.", shared by the retrieval tasks."""

import random

from topmass.errors import ConfigError
from topmass.eval.tasks.base import Question
from topmass.eval.tasks.words import ADJECTIVES, NOUNS

__all__ = ["code", "digits", "draw_keys", "needle", "question"]


def draw_keys(rng: random.Random, n: int) -> list[str]:
    """`n` different keys of two words."""
    total = len(ADJECTIVES) * len(NOUNS)
    if n > total:
        raise ConfigError(f"{n} needles need more keys than the {total} there are; use a shorter length")
    return [f"{ADJECTIVES[i // len(NOUNS)]} {NOUNS[i % len(NOUNS)]}" for i in rng.sample(range(total), n)]


def digits(rng: random.Random, n: int) -> str:
    """`n` digits, the first of them not zero."""
    return str(rng.randrange(10 ** (n - 1), 10**n))


def code(rng: random.Random) -> str:
    """A value: four digits."""
    return digits(rng, 4)


def needle(key: str, value: str) -> str:
    """The sentence that hides a value."""
    return f"The code of the {key} is {value}."


def question(key: str, value: str, after: int) -> Question:
    """Ask for one value."""
    return Question(
        text=f"Question: What is the code of the {key}?\nAnswer:", answer=value, references=(value,), after=after
    )
