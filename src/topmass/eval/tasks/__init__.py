"""Evaluation tasks: text whose questions have known answers, of an exact length in any tokenizer."""

import difflib
import re
from pathlib import Path
from typing import Any

from topmass.errors import ConfigError
from topmass.eval.tasks.base import Sample, Task, sample_haystacks
from topmass.eval.tasks.common_words import CommonWords
from topmass.eval.tasks.frequent_words import FrequentWords
from topmass.eval.tasks.latent_association import LatentAssociation
from topmass.eval.tasks.majority import Majority
from topmass.eval.tasks.niah_distractor import NiahDistractor
from topmass.eval.tasks.niah_multiquery import NiahMultiquery
from topmass.eval.tasks.niah_multivalue import NiahMultivalue
from topmass.eval.tasks.niah_single import NiahSingle
from topmass.eval.tasks.niah_uuid import NiahUuid
from topmass.eval.tasks.variable_tracking import VariableTracking

__all__ = ["TASKS", "Sample", "Task", "get_task", "list_tasks", "make_samples", "score"]

_ALL: tuple[Task, ...] = (
    NiahSingle(), NiahDistractor(), NiahUuid(), NiahMultivalue(), NiahMultiquery(),
    VariableTracking(), CommonWords(), FrequentWords(), Majority(), LatentAssociation(),
)  # fmt: skip
TASKS: dict[str, Task] = {task.name: task for task in _ALL}


def list_tasks() -> tuple[str, ...]:
    """The names of all tasks."""
    return tuple(TASKS)


def get_task(name: str) -> Task:
    """The task of that name.

    Raises:
        ConfigError: There is none.
    """
    if name in TASKS:
        return TASKS[name]
    near = difflib.get_close_matches(name, TASKS, n=1)
    hint = f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(TASKS)}."
    raise ConfigError(f"Unknown task {name!r}. {hint}")


def make_samples(
    task: str,
    tokenizer: Any,
    *,
    length: int,
    n: int,
    seed: int = 0,
    questions: int = 1,
    haystack: str | Path | None = None,
    first: int = 0,
) -> list[Sample]:
    """`n` haystacks of a task with `questions` questions each, all of them a function of the arguments alone.

    Prompt and `max_new_tokens` together never exceed `length` tokens, and for the haystack's longest question they reach it
    exactly wherever the tokenizer encodes " so" as one token (at worst a few tokens are missing). The context is the same
    string for every question of a haystack.

    Args:
        tokenizer: The model's own: called with a string, returns a mapping with `input_ids`.
        length: Tokens of a prompt and its answer together.
        haystack: A UTF-8 text file that replaces the bundled filler.
        first: Index of the first haystack: processes can share the work, and the samples are those of one call.

    Raises:
        ConfigError: An unknown task, or more questions than a haystack supports.
        DataError: The length is too small for the task, or the haystack cannot be used.

    Example:
        >>> samples = make_samples("niah_single", tokenizer, length=1024, n=2, questions=4)  # doctest: +SKIP
    """
    chosen = get_task(task)
    if not 1 <= questions <= chosen.max_questions:
        raise ConfigError(f"questions must be 1 to {chosen.max_questions} for {task}, got {questions}")
    if n < 1 or first < 0:
        raise ConfigError(f"n must be at least 1 and first at least 0, got {n} and {first}")
    if haystack is not None and chosen.filler is None:
        raise ConfigError(f"{task} has no filler to replace; leave haystack out")

    def count(text: str) -> int:
        return len(tokenizer(text)["input_ids"])

    return sample_haystacks(
        chosen, count, length=length, n=n, seed=seed, questions=questions, haystack=haystack, first=first
    )


def score(sample: Sample, prediction: str) -> float:
    """The share of the references found in the prediction as whole words, whatever the case."""
    found = [
        re.search(rf"(?<!\w){re.escape(r)}(?!\w)", prediction, re.IGNORECASE) is not None for r in sample.references
    ]
    return sum(found) / len(found)
