"""What the indexer's recipes share: budgets as shares of the context, and samples written and tokenised by other processes."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

import topmass
from topmass.core.budget import Budget
from topmass.core.plan import Plan
from topmass.distill import Sequences, TaskSequences
from topmass.eval.tasks import Sample, list_tasks, make_samples
from topmass.integrations.transformers.reference import REFERENCE

# `majority` came later than the nine tasks that the macro average was defined over
TENTH = "majority"
NINE = tuple(task for task in list_tasks() if task != TENTH)
# their answer depends on many keys
COUNTING = ("common_words", "frequent_words", "majority")
# tasks that tell selectors apart, and two that retrieve
TELLING = (*COUNTING, "variable_tracking", "niah_uuid")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """A budget as shares of the context: one for all full-attention layers, or one for each of them.

    Attributes:
        shares: In the order of the layers.
        visible: Shares of the keys that a query sees, not of the whole context.

    Example:
        >>> str(Shares.parse("1/64,7/64")), Shares.parse("1/64,7/64").mean
        ('1/64,7/64', Fraction(1, 16))
    """

    shares: tuple[Fraction, ...]
    visible: bool = False

    @classmethod
    def parse(cls, text: str) -> "Shares":
        """Read `1/16`, `1/64,7/64`, or either with a final `v` for shares of the visible keys."""
        return cls(shares=tuple(map(Fraction, text.removesuffix("v").split(","))), visible=text.endswith("v"))

    def __str__(self) -> str:
        return ",".join(map(str, self.shares)) + "v" * self.visible

    @property
    def mean(self) -> Fraction:
        """Mean over the layers."""
        return sum(self.shares, Fraction(0)) / len(self.shares)

    def tokens(self, length: int) -> int:
        """Mean over the layers in tokens, for selectors that know no plan; of the last query, if shares are of the visible keys."""
        return int(length * self.mean)

    def budget(self, length: int, layers: Sequence[int], *, extra: int = 0) -> Budget | Plan:
        """What a selector takes.

        Args:
            length: Tokens of the context.
            layers: The full-attention layers.
            extra: Tokens on top of it, if it is one of tokens.
        """
        if self.visible:
            each = [Budget(share=s) for s in self.shares]
        else:
            each = [Budget(tokens=int(length * s) + extra) for s in self.shares]
        return each[0] if len(each) == 1 else Plan(layers=dict(zip(layers, each, strict=True)))


@dataclass(slots=True)
class Known:
    """A tokenizer that remembers texts which were tokenised elsewhere."""

    tokenizer: Any
    ids: dict[str, Any] = field(default_factory=dict)

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        if add_special_tokens and text in self.ids:
            return {"input_ids": self.ids[text].tolist()}
        return self.tokenizer(text, add_special_tokens=add_special_tokens)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


Job = tuple[str, int, int, int, int]


def write_samples(job: Job) -> list[tuple[Sample, Any]]:
    """Samples of one task, and the ids of their contexts: task, length, first haystack, haystacks, seed."""
    from transformers import AutoTokenizer

    task, length, first, n, seed = job
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    samples = make_samples(task, tokenizer, length=length, n=n, seed=seed, first=first)
    return [(s, np.array(tokenizer(s.context)["input_ids"], dtype=np.int32)) for s in samples]


class Library:
    """Samples of the tasks, by other processes, handed out task by task and, unless `keep` is set, once."""

    def __init__(self, pool: ProcessPoolExecutor, *, seed: int, keep: bool = False) -> None:
        self._pool, self._seed, self._keep = pool, seed, keep
        self._jobs: dict[Job, Future[list[tuple[Sample, Any]]]] = {}

    def order(self, task: str, length: int, first: int, n: int) -> None:
        """Have `n` haystacks written."""
        job = (task, length, first, n, self._seed)
        if job not in self._jobs:
            self._jobs[job] = self._pool.submit(write_samples, job)

    def take(self, known: Known, task: str, length: int, first: int, n: int) -> list[Sample]:
        """Those samples; `known` remembers their tokens, and nothing older."""
        self.order(task, length, first, n)
        job = (task, length, first, n, self._seed)
        rows = (self._jobs[job] if self._keep else self._jobs.pop(job)).result()
        known.ids = {s.context: ids for s, ids in rows}
        return [s for s, _ in rows]


class Stored(Sequences):
    """Training sequences that `store` wrote: no time goes into text while indexers train."""

    def __init__(self, path: Path) -> None:
        self._train, self._held = np.load(path / "train.npy", mmap_mode="r"), np.load(path / "held-out.npy")
        self.length, self.about = self._train.shape[1], (path / "about.txt").read_text()

    def sequence(self, index: int, *, held_out: bool = False) -> list[int]:
        """The sequence of that index, repeated if there are no more."""
        rows = self._held if held_out else self._train
        return rows[index % len(rows)].tolist()


def write_sequences(job: tuple[int, int, range, bool]) -> Any:
    """Ids of some sequences: length, seed, indices, held out or not."""
    from transformers import AutoTokenizer

    length, seed, indices, held_out = job
    made = TaskSequences(AutoTokenizer.from_pretrained(REFERENCE), length=length, seed=seed)
    return np.array([made.sequence(i, held_out=held_out) for i in indices], dtype=np.int32)


def store(
    path: Path, *, length: int, sequences: int, seed: int, workers: int, measured: Mapping[int, int] | None = None
) -> None:
    """Write training sequences, six held-out ones, and others of several lengths to measure on.

    Args:
        path: Directory for the files.
        length: Tokens of a training sequence.
        sequences: How many to train on.
        seed: Seed of the text.
        workers: Processes that write it.
        measured: How many sequences to measure on, by length.
    """
    path.mkdir(parents=True, exist_ok=True)
    ranges = [range(i, min(i + 32, sequences)) for i in range(0, sequences, 32)]
    jobs = [*((length, seed, r, False) for r in ranges), (length, seed, range(6), True)]
    singles = [(n, seed, range(i, i + 1), True) for n, many in (measured or {}).items() for i in range(many)]
    with ProcessPoolExecutor(workers) as pool:
        parts = list(pool.map(write_sequences, [*jobs, *singles]))
    np.save(path / "train.npy", np.concatenate(parts[: len(ranges)]))
    np.save(path / "held-out.npy", parts[len(ranges)])
    for n in measured or {}:
        rows = [p for p, job in zip(parts[len(jobs) :], singles, strict=True) if job[0] == n]
        np.save(path / f"measure-{n}.npy", np.concatenate(rows))
    (path / "about.txt").write_text(f"tasks, seed {seed}, {sequences} sequences")


def blocks(length: int, ends: Sequence[int], batch_tokens: int) -> Iterator[tuple[int, int]]:
    """Ranges of haystacks that fit into a batch; no range crosses one of `ends`."""
    size = max(1, batch_tokens // length)
    start = 0
    for end in sorted(set(ends)):
        parts = -(-(end - start) // size)
        for i in range(parts):
            yield start + (end - start) * i // parts, start + (end - start) * (i + 1) // parts
        start = max(start, end)


def untrained(indexer: topmass.Indexer) -> topmass.Indexer:
    """An untrained indexer of the same shape."""
    info = indexer.info
    return topmass.Indexer.create(info.layers, info.fingerprint, granularity=info.granularity, model=info.model)


def common_options(parser: argparse.ArgumentParser) -> None:
    """Options that every part has."""
    parser.add_argument("--indexer", default="reference", help="a directory, or the one that ships with the package")
    parser.add_argument("--device", default=None)
    parser.add_argument("--batch-tokens", type=int, default=524288, help="prompt tokens computed together")
    parser.add_argument("--workers", type=int, default=4, help="processes that write samples")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop (and resume with the same command) after this")
