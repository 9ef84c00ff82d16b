"""Sequences to distil on: the evaluation's own generators at other seeds, or texts, packed to the training length.

A sequence is a function of its index alone, so a run resumes at a step and processes share the work without a cursor.
Documents are packed one after the other, an end-of-text token between them, and cut at the training length. Nothing is
masked: a query sees the documents before its own, exactly as the model does when it is given that text.
"""

import hashlib
import itertools
import json
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int32
from torch import Tensor

from topmass.errors import ConfigError, DataError
from topmass.eval.tasks import TASKS
from topmass.eval.tasks.base import Task, bundled_filler, render

__all__ = ["Sequences", "TaskSequences", "TextSequences", "check_data", "open_data", "read_texts"]

# told (tokens so far, tokens wanted) while texts are read
Told = Callable[[int, int], None]

PROBE = 48  # units of the small haystack that says how many tokens one takes
ENCODED_TOGETHER = 256  # documents


class Sequences(ABC):
    """Token sequences of one length, training and held out, by index.

    Attributes:
        length: Tokens of a sequence.
        about: What they are made of, for the manifest.
    """

    length: int
    about: str

    @abstractmethod
    def sequence(self, index: int, *, held_out: bool = False) -> list[int]:
        """Ids of a sequence, the same at every call. Training and held-out sequences never share a document's text."""

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits that differ where the sequences do."""
        text = json.dumps([self.about, self.length, self.sequence(0), self.sequence(0, held_out=True)])
        return hashlib.sha256(text.encode()).hexdigest()[:12]


class TaskSequences(Sequences):
    """Haystacks of the evaluation's tasks with all their questions and answers, from seeds that no evaluation uses.

    A third of the sequences are one haystack as long as fits, the others several shorter ones, so that keys lie near and far,
    other haystacks distract, and many rows belong to questions and answers.

    Args:
        seed: Other seeds give other sequences.
        tasks: Task names; `None` means all.
    """

    def __init__(self, tokenizer: Any, *, length: int, seed: int = 0, tasks: Sequence[str] | None = None) -> None:
        self.length, self.about = length, f"tasks, seed {seed}"
        self._tokenizer, self._seed, self._tasks = tokenizer, seed, tuple(tasks or TASKS)
        self._head, self._end = _edges(tokenizer)

    def sequence(self, index: int, *, held_out: bool = False) -> list[int]:
        rng = random.Random(f"distill {self._seed} {'held out' if held_out else 'train'} {index}")
        ids = list(self._head)
        parts = rng.choice((1, 1, 2, 4, 8, 16))
        while len(ids) < self.length:
            room = min(self.length - len(ids), -(-self.length // parts))
            ids += self._document(rng, TASKS[rng.choice(self._tasks)], room)
        return ids[: self.length]

    def _document(self, rng: random.Random, task: Task, room: int) -> list[int]:
        """A haystack and its questions of about `room` tokens, or the smallest there is."""
        start = bundled_filler(task.filler)
        probe = max(task.min_size, PROBE)
        rate = len(self._encode(render(task.build(rng, probe, start(rng)).units))) / probe
        built = task.build(rng, max(task.min_size, int(0.9 * room / rate)), start(rng))
        asked = "".join(f"{q.text} {q.answer}\n" for q in built.questions)
        return self._encode(render(built.units) + asked) + self._end

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]


class TextSequences(Sequences):
    """Texts in random order, packed; the last sequences are held out, the others repeat in another order every epoch.

    Args:
        wanted: Tokens that training and evaluation will use; texts beyond are not read.
        held_out: Sequences to hold out; at most a quarter of all.
        told: Called while texts are read.

    Raises:
        DataError: There is no text, or too little for two sequences.
    """

    def __init__(
        self,
        texts: Sequence[str],
        tokenizer: Any,
        *,
        about: str,
        length: int,
        wanted: int,
        held_out: int,
        seed: int = 0,
        told: Told | None = None,
    ) -> None:
        self.length, self.about, self._seed = length, f"{about}, seed {seed}", seed
        self._head, end = _edges(tokenizer)
        self._step = length - len(self._head)
        order = list(range(len(texts)))
        random.Random(f"distill {seed} order").shuffle(order)
        self.tokens = _pack((texts[i] for i in order), tokenizer, end, wanted, told)
        found = len(self.tokens) // self._step
        if not len(self.tokens):
            raise DataError(f"{about} holds no text; give files with text in them.")
        if found < 2:
            raise DataError(
                f"{about} holds {len(self.tokens)} tokens, too few for two sequences of {length} (one to train on, one "
                "held out); give more text or a smaller --length."
            )
        self._held = max(1, min(held_out, found // 4))
        self.trained = found - self._held

    def sequence(self, index: int, *, held_out: bool = False) -> list[int]:
        at = self.trained + index % self._held if held_out else self._place(index)
        return self._head + self.tokens[at * self._step : (at + 1) * self._step].tolist()

    def _place(self, index: int) -> int:
        epoch, at = divmod(index, self.trained)
        order = torch.randperm(self.trained, generator=torch.Generator().manual_seed(self._seed * 100_003 + epoch))
        return int(order[at])

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(json.dumps([self.about, self.length, self.trained]).encode())
        digest.update(self.tokens.numpy().tobytes())
        return digest.hexdigest()[:12]


def open_data(
    data: Any,
    tokenizer: Any,
    *,
    length: int,
    wanted: int,
    held_out: int,
    seed: int = 0,
    text_field: str = "text",
    told: Told | None = None,
) -> Sequences:
    """Turn what a user calls data into sequences.

    Args:
        data: `"tasks"`; a text, JSONL or Parquet file or several; the name of a data set on the hub, `name` or
            `name:configuration`; or `Sequences` of your own.
        length: Tokens of a sequence.
        wanted: Tokens that will be used.
        held_out: Sequences to hold out.
        seed: Seed of the order, or of the tasks.
        text_field: Column or key that holds the text.
        told: Called while texts are read.

    Raises:
        ConfigError: The sequences given have another length.
        DataError: The data cannot be read, or holds too little text.
    """
    if isinstance(data, Sequences):
        if data.length != length:
            raise ConfigError(f"The data has sequences of {data.length} tokens; set length={data.length}.")
        return data
    if data == "tasks":
        return TaskSequences(tokenizer, length=length, seed=seed)
    names = [data] if isinstance(data, (str, Path)) else list(data)
    texts = read_texts(names, field=text_field)
    about = ", ".join(str(n) for n in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return TextSequences(
        texts, tokenizer, about=about, length=length, wanted=wanted, held_out=held_out, seed=seed, told=told
    )


def check_data(names: Sequence[str | Path]) -> None:
    """Refuse names of files that are not there, before anything slow begins.

    Raises:
        DataError: A name is neither a file nor possibly a data set.
    """
    if not names:
        raise DataError("No data is named; give a file, a data set, or `tasks`.")
    if "tasks" in names and len(names) > 1:
        raise DataError("`tasks` cannot be mixed with files; give one or the other.")
    for name in names:
        path = Path(name).expanduser()
        if path.is_dir():
            raise DataError(f"{name} is a directory; name its files, for example {path}/*.jsonl.")
        if path.suffix == ".json":
            raise DataError(
                f"{name} is JSON, which is read from JSONL only; write one object a line, in a .jsonl file."
            )
        if not path.exists() and _looks_like_a_file(str(name)):
            raise DataError(f"There is no file {name}; check the path.")
        if not path.exists() and name != "tasks":
            _datasets(str(name))


def _looks_like_a_file(name: str) -> bool:
    path = Path(name)
    known = path.suffix in (".txt", ".jsonl", ".ndjson", ".parquet")
    return known or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1


def read_texts(names: Sequence[str | Path], *, field: str = "text") -> Sequence[str]:
    """Documents of text, JSONL and Parquet files and of data sets, by the name's ending.

    Raises:
        DataError: A name is neither a file nor a data set, or a document is no text.
    """
    check_data(names)
    parts = [_read(str(name), field) for name in names]
    return parts[0] if len(parts) == 1 else list(itertools.chain.from_iterable(parts))


def _read(name: str, field: str) -> Sequence[str]:
    path = Path(name).expanduser()
    try:
        if path.suffix in (".jsonl", ".ndjson"):
            return list(_json_lines(path, field))
        if path.suffix == ".parquet":
            return _parquet(path, field)
        if path.is_file():
            return [path.read_text(encoding="utf-8")]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read {name}: {error}; give UTF-8 text, JSONL or Parquet.") from error
    return _dataset(name, field)


def _json_lines(path: Path, field: str) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}, line {number}, is not JSON ({error}); mend or remove the line.") from error
            text = row.get(field) if isinstance(row, dict) else None
            yield _text(text, f"{path}, line {number}", field, row if isinstance(row, dict) else ())


def _parquet(path: Path, field: str) -> list[str]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError("Parquet files need pyarrow: pip install pyarrow.") from error
    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        if field not in names:
            raise DataError(_no_field(str(path), field, names))
        column = file.read([field])[field].to_pylist()
    except pa.ArrowException as error:
        raise DataError(f"{path} is not a readable Parquet file ({error}); write it again.") from error
    return [_text(x, f"{path}, row {i}", field, names) for i, x in enumerate(column)]


def _dataset(name: str, field: str) -> "Sequence[str]":
    datasets = _datasets(name)
    path, _, configuration = name.partition(":")
    try:
        table: Any = datasets.load_dataset(path, configuration or None, split="train")
    except Exception as error:  # the ways in which a download can fail are not one family
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{name} is no file, and no data set with a split `train` ({first}); check the name and the network."
        ) from error
    if field not in table.column_names:
        raise DataError(_no_field(name, field, table.column_names))
    return _Column(table, name, field)


def _datasets(name: str) -> Any:
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise DataError(
            f"{name} is no file; to read it as a data set of the hub, install the package `datasets`."
        ) from error
    return datasets


class _Column(Sequence[str]):
    """Texts of a data set, read when they are wanted."""

    def __init__(self, table: Any, name: str, field: str) -> None:
        self._table, self._name, self._field = table, name, field

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, i: Any) -> Any:
        row = self._table[i]
        return _text(row[self._field], f"{self._name}, row {i}", self._field, row)


def _text(value: Any, where: str, field: str, fields: Iterable[str]) -> str:
    if isinstance(value, str):
        return value
    if value is None and field not in fields:
        raise DataError(_no_field(where, field, fields))
    raise DataError(f"{where}: {field!r} is {value!r}, not text; remove it or choose another --text-field.")


def _no_field(where: str, field: str, fields: Iterable[str]) -> str:
    there = ", ".join(map(repr, fields)) or "no named fields"
    return f"{where} has no {field!r}, but {there}; choose one with --text-field."


def _edges(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the model expects before a text, and what ends a document."""
    first = tokenizer("")["input_ids"][:1]
    head = [i for i in first if i == tokenizer.bos_token_id]
    return head, [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _pack(texts: Iterable[str], tokenizer: Any, end: list[int], wanted: int, told: Told | None) -> Int32[Tensor, " n"]:
    """Texts joined, up to `wanted` tokens."""
    parts: list[Tensor] = []
    held, remaining = 0, iter(texts)
    while held < wanted and (some := list(itertools.islice(remaining, ENCODED_TOGETHER))):
        if kept := [text for text in some if text]:
            rows = tokenizer(kept, add_special_tokens=False)["input_ids"]
            parts.append(torch.tensor([i for row in rows for i in (*row, *end)], dtype=torch.int32))
            held += len(parts[-1])
        if told is not None:
            told(min(held, wanted), wanted)
    return torch.cat(parts)[:wanted] if parts else torch.zeros(0, dtype=torch.int32)
