"""What every task is made of: a haystack, its questions, and samples of an exact length."""

import hashlib
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from topmass.errors import ConfigError, DataError
from topmass.eval.tasks.words import NOISE, Prose

__all__ = [
    "INTRO",
    "Filler",
    "Haystack",
    "Question",
    "Sample",
    "Task",
    "file_filler",
    "render",
    "sample_haystacks",
    "scatter",
]

INTRO = "Read the notes below and answer the question that follows them.\n"
CLOSE = 48  # tokens that may be left to the padding
_PAD = " so"  # what fills the last few tokens: one token in every tokenizer we know

Filler = Callable[[random.Random], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One question about one haystack.

    Args:
        context: The haystack, the same string for every question of it; ends with a newline.
        question: The question; ends with the cue after which the answer is generated.
        references: Every string that the answer should contain.
        length: Tokens of the prompt and of `max_new_tokens` together, at most.
        haystack: Index of the haystack.
        question_id: Index of the question among the haystack's.
    """

    task: str
    context: str
    question: str
    references: tuple[str, ...]
    length: int
    haystack: int
    question_id: int
    seed: int
    max_new_tokens: int

    @property
    def prompt(self) -> str:
        """Context and question."""
        return self.context + self.question


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question that holds for a haystack.

    Args:
        answer: What a perfect model writes after the cue, references in the order asked for.
        after: The question can be answered once this many of the haystack's units have been read.
    """

    text: str
    answer: str
    references: tuple[str, ...]
    after: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Haystack:
    """Sentences in order, and the questions about them."""

    units: tuple[str, ...]
    questions: tuple[Question, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task(ABC):
    """One kind of question.

    Args:
        filler: `"prose"`, `"noise"`, or `None` where the haystack has no filler.
        max_new_tokens: Tokens granted to the answer.
        max_questions: Questions that one haystack supports.
        min_size: Units of the smallest haystack.
    """

    name: str
    filler: str | None
    max_new_tokens: int
    max_questions: int
    min_size: int

    @abstractmethod
    def build(self, rng: random.Random, size: int, filler: Filler) -> Haystack:
        """A haystack of `size` units."""


def render(units: tuple[str, ...]) -> str:
    """The text of a haystack."""
    return f"{INTRO}{' '.join(units)}\n"


def scatter(rng: random.Random, facts: list[str], size: int, filler: Filler) -> tuple[tuple[str, ...], list[int]]:
    """Spread `facts`, in order, evenly at random over `size` units; the rest is filler. Also says where each went."""
    if size < len(facts):
        raise ConfigError(f"{len(facts)} facts do not fit into {size} sentences")
    places = sorted(rng.sample(range(size), len(facts)))
    units = dict(zip(places, facts, strict=True))
    return tuple(units[i] if i in units else filler(rng) for i in range(size)), places


def file_filler(path: str | Path) -> Callable[[random.Random], Filler]:
    """Filler made of a text file's sentences, in order, starting anywhere.

    Raises:
        DataError: The file cannot be read or holds no text.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"cannot read the haystack {path}: {e}; give a UTF-8 text file") from e
    sentences = [" ".join(s.split()) for s in re.split(r"(?<=[.!?])\s+", text) if s.strip()]
    if not sentences:
        raise DataError(f"the haystack {path} is empty; give a UTF-8 text file with sentences in it")

    def start(rng: random.Random) -> Filler:
        at = rng.randrange(len(sentences))

        def filler(rng: random.Random) -> str:
            nonlocal at
            at = (at + 1) % len(sentences)
            return sentences[at]

        return filler

    return start


def bundled_filler(kind: str | None) -> Callable[[random.Random], Filler]:
    """The filler that comes with the package."""
    return lambda rng: Prose() if kind == "prose" else lambda rng: rng.choice(NOISE)


def sample_haystacks(
    task: Task,
    count: Callable[[str], int],
    *,
    length: int,
    n: int,
    seed: int,
    questions: int,
    haystack: str | Path | None,
    first: int = 0,
) -> list[Sample]:
    """The samples of `n` haystacks; see `make_samples`."""
    start = file_filler(haystack) if haystack is not None else bundled_filler(task.filler)
    makers = [_Maker(task, count, start, seed, index, questions) for index in range(first, first + n)]
    if max(m.used(m.build(task.min_size, length)) for m in makers) > length:
        least = length
        while (need := max(m.used(m.build(task.min_size, least)) for m in makers)) > least:
            least = need
        raise DataError(
            f"{task.name} does not fit into {length} tokens with this tokenizer; take a length of at least {least}, or "
            "leave the task out."
        )
    return [sample for maker in makers for sample in maker.samples(length)]


@dataclass(frozen=True, slots=True)
class _Maker:
    """Makes one haystack."""

    task: Task
    count: Callable[[str], int]
    start: Callable[[random.Random], Filler]
    seed: int
    index: int
    questions: int

    def build(self, size: int, length: int) -> Haystack:
        rng = _rng(self.task.name, self.seed, length, self.index)
        return self.task.build(rng, size, self.start(rng))

    def used(self, built: Haystack, context: str | None = None) -> int:
        """Tokens of the longest prompt and its answer."""
        context = render(built.units) if context is None else context
        # counting a context is slow: only with the question that is longest by itself
        longest = max(built.questions[: self.questions], key=lambda q: self.count(q.text))
        return self.count(context + longest.text) + self.task.max_new_tokens

    def samples(self, length: int) -> list[Sample]:
        built = self._largest(length)
        rng = _rng(self.task.name, self.seed, length, self.index, "pad")
        context = _pad(render(built.units), self.start(rng), rng, lambda c: self.used(built, c) - length)
        asked = built.questions[: self.questions]
        if any(self.count(context + q.text) + self.task.max_new_tokens > length for q in asked):
            context = render(built.units)
        return [
            Sample(
                task=self.task.name, context=context, question=q.text, references=q.references, length=length,
                haystack=self.index, question_id=i, seed=self.seed, max_new_tokens=self.task.max_new_tokens,
            )
            for i, q in enumerate(asked)
        ]  # fmt: skip

    def _largest(self, length: int) -> Haystack:
        """A haystack that fits and leaves little to the padding, or the largest that fits: by the secant."""
        low, high, above = self.task.min_size, None, 0
        best = self.build(low, length)
        used = self.used(best)
        rate = max((used - self.task.max_new_tokens) / low, 1.0)
        while length - used > CLOSE and (high is None or high - low > 1):
            if high is None:
                size = low + max(1, int((length - used) / rate))
            else:
                size = low + int((length - used) / (above - used) * (high - low))
                size = min(max(size, low + 1), high - 1)
            trial = self.build(size, length)
            need = self.used(trial)
            if need <= length:
                rate = max((need - used) / (size - low), 1.0)
                best, low, used = trial, size, need
            else:
                high, above = size, need
        return best


def _pad(context: str, filler: Filler, rng: random.Random, excess: Callable[[str], int]) -> str:
    """Fill up to the exact length: whole sentences before the first, then single words, then a newline."""
    head, body = context[: len(INTRO)], context[len(INTRO) :]
    for _ in range(8):
        longer = f"{filler(rng)} {body}"
        if excess(head + longer) <= 0:
            body = longer
    for words in range(-excess(head + body) - 1, -1, -1):
        pad = _PAD * words + "\n"
        if excess(head + pad + body) <= 0:
            return head + pad + body
    return head + body


def _rng(*key: object) -> random.Random:
    """A generator that depends on `key` alone, on every machine and in every process."""
    return random.Random(int.from_bytes(hashlib.sha256("\0".join(map(str, key)).encode()).digest()[:8]))
