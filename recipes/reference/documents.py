"""Training documents of the reference checkpoint: the tasks' own haystacks with as many questions as fit, from other seeds.

A document is a haystack in exactly the evaluation's format (or a denser one) followed by its questions and answers, or with
them in between. Every token has a weight in the loss, and every answer token the number of its task.
"""

import dataclasses
import json
import random
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from topmass.eval.tasks import TASKS
from topmass.eval.tasks.base import INTRO, Haystack, Question, bundled_filler
from topmass.eval.tasks.words import FIELDS, INSTRUMENTS

PIECES = re.compile(r" ?[A-Za-z]+| ?[0-9]| ?[^A-Za-z0-9\s]|\s")
NAMES = tuple(TASKS)
MIXTURE = {
    "niah_single": 3, "niah_distractor": 4, "niah_uuid": 5, "niah_multivalue": 14, "niah_multiquery": 6,
    "variable_tracking": 15, "common_words": 13, "frequent_words": 14, "majority": 10, "latent_association": 22,
}  # fmt: skip
NEEDLE = re.compile(r"The code of the (\w+) is \d+\.")
FIELD_OF = {thing: field for field, things in INSTRUMENTS.items() for thing in things}
COUNTING = ("common_words", "frequent_words", "majority")
TEXT_WEIGHT, ANSWER_WEIGHT = 0.5, 4.0


class Encoder:
    """Encode piece by piece from a table: exact, for the tokenizer's pre-tokenizer cuts at the same places."""

    def __init__(self, directory: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self.table: dict[str, list[int]] = {}
        self.eos = self.tokenizer.token_to_id("<|end|>")
        self.digits = {self.tokenizer.token_to_id(s + d) for d in "0123456789" for s in ("", "Ġ")}

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in PIECES.findall(text):
            known = self.table.get(piece)
            if known is None:
                known = self.table[piece] = self.tokenizer.encode(piece).ids
            ids += known
        return ids


class Documents:
    """An endless source of rows of exact length."""

    def __init__(self, encoder: Encoder, seed: int) -> None:
        self.encode, self.rng, self.rate = encoder, random.Random(seed), {}

    def row(self, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids, weights and task numbers (0 outside answers) of one row."""
        ids, weights, tags = [], [], []
        name = self.rng.choices(NAMES, [MIXTURE[n] for n in NAMES])[0]
        while len(ids) < length:
            room = length - len(ids)
            if ids and room < 160:
                name = "prose"
            part = self._prose(room) if name == "prose" else self.document(name, room)
            for whole, new in zip((ids, weights, tags), part, strict=True):
                whole += new
            # what is left over gets a document whose answers the first cannot disturb
            name = self.rng.choice(("latent_association", "niah_single", "niah_uuid", "prose"))
        return (
            np.array(ids[:length], np.int16),
            np.array(weights[:length], np.float16),
            np.array(tags[:length], np.int8),
        )

    def document(self, name: str, room: int) -> tuple[list[int], list[float], list[int]]:
        """One haystack with its questions, of at most `room` tokens."""
        rng = self.rng
        dense = rng.random() < (0.65 if room <= 1024 else 0.5)
        mixed = name not in COUNTING and rng.random() < 0.4
        share = rng.random()
        key = (name, dense, room)
        size = max(2, int(0.97 * room / self.rate.get(key, 14.0)))
        best = None
        for _ in range(6):
            hay = self._build(name, dense, share, size)
            total = len(doc := self._write(name, hay, mixed)[0])
            if total > 60:
                self.rate[key] = 0.8 * self.rate.get(key, total / size) + 0.2 * total / size
            if total <= room:
                best = doc, *self._written
                break
            size = max(2, int(size * 0.93 * room / total))
        return best if best is not None else self._prose(room)

    def _build(self, name: str, dense: bool, share: float, size: int) -> Haystack:
        task = TASKS[name]
        task = _denser(task, self.rng, share, size) if dense or size < task.min_size else task
        filler = bundled_filler(task.filler if not dense or self.rng.random() < 0.5 else "prose")(self.rng)
        hay = task.build(self.rng, size, filler)
        return self._explain(hay) if name == "latent_association" else hay

    def _explain(self, hay: Haystack) -> Haystack:
        """Say in some documents what a thing belongs to, which the evaluation never does."""
        told = self.rng.choice((0.0, 0.0, 0.5, 1.0))
        units = [f"{u}{self._field(u)}" if self.rng.random() < told else u for u in hay.units]
        return dataclasses.replace(hay, units=tuple(units))

    def _field(self, unit: str) -> str:
        found = NEEDLE.fullmatch(unit)
        return f" It belongs to {FIELD_OF[found[1]]}." if found and found[1] in FIELD_OF else ""

    def _write(self, name: str, hay: Haystack, mixed: bool) -> tuple[list[int], list[float], list[int]]:
        ids, tags = self.encode(INTRO), []
        tags = [0] * len(ids)

        def text(s: str) -> None:
            new = self.encode(s)
            ids.extend(new)
            tags.extend([0] * len(new))

        def ask(q: Question) -> None:
            text(q.text)
            answer = self.encode(f" {q.answer}\n")
            ids.extend(answer)
            tags.extend([1 + NAMES.index(name)] * len(answer))

        waiting = sorted(hay.questions, key=lambda q: q.after) if mixed else []
        start, ready = True, []
        for i, unit in enumerate(hay.units):
            text(unit if start and i == 0 else " " + unit)
            while waiting and waiting[0].after <= i + 1:
                ready.append(waiting.pop(0))
            if ready and self.rng.random() < 0.15:
                text("\n")
                for _ in range(min(len(ready), self.rng.randint(1, 4))):
                    ask(ready.pop(self.rng.randrange(len(ready))))
        text("\n")
        rest = ready + waiting if mixed else list(hay.questions)
        self.rng.shuffle(rest)
        for q in rest:
            ask(q)
        ids.append(self.encode.eos)
        tags.append(0)
        answers = sum(t > 0 for t in tags)
        heavy = min(max(ANSWER_WEIGHT, 0.25 * len(ids) / max(answers, 1)), 16 * max(1.0, len(ids) / 512) ** 0.5)
        digits = self.encode.digits
        weights = [heavy if t else (0.0 if i in digits else TEXT_WEIGHT) for i, t in zip(ids, tags, strict=True)]
        self._written = weights, tags
        return ids, weights, tags

    def _prose(self, room: int) -> tuple[list[int], list[float], list[int]]:
        filler, ids = bundled_filler("prose")(self.rng), []
        while len(ids) < room:
            ids += self.encode(" " + filler(self.rng))
        ids = ids[:room]
        return ids, [TEXT_WEIGHT] * room, [0] * room


def _denser(task: Any, rng: random.Random, share: float, size: int) -> Any:
    """The same task with more facts and more questions for its length; counting tasks with clearer leads too."""
    few = max(2, int(size * (0.1 + 0.4 * share)))
    match task.name:
        case "niah_single":
            return dataclasses.replace(task, needles=few)
        case "niah_distractor":
            return dataclasses.replace(task, max_questions=max(2, int(size * (0.2 + 0.8 * share))))
        case "niah_uuid":
            n = max(1, few // 2)
            return dataclasses.replace(task, share=n / size, max_questions=n)
        case "niah_multivalue":
            values = rng.randint(2, 4)
            return dataclasses.replace(task, values=values, keys=max(1, few // values))
        case "niah_multiquery":
            return dataclasses.replace(task, needles=min(size, max(3, few)))
        case "variable_tracking":
            names = rng.choice(((1, 1), (1, 2), (1, 3), (3, 5), (3, 5)))
            return dataclasses.replace(
                task, names=names, chains=max(1, min(size // (2 * names[1]), rng.randint(2, 30)))
            )
        case "latent_association":
            return dataclasses.replace(task, things=(n := min(len(FIELDS), max(2, few))), max_questions=n)
    lead, prose, n = task.lead * rng.choice((1, 1.5, 2, 3)), 0.5 * rng.random(), rng.randint(2, 12)
    match task.name:
        case "majority":
            return dataclasses.replace(task, kinds=max(1, min(n, size // 12)), prose=prose, lead=lead)
        case "common_words":
            return dataclasses.replace(task, speakers=max(1, min(n, size // 12)), prose=prose, lead=lead)
    words = rng.choice((8, 12, 16))
    return dataclasses.replace(task, places=max(1, min(n, size // 30)), words=words, prose=prose, lead=lead)


def evaluation_row(encoder: Encoder, name: str, length: int, seed: int) -> tuple[list[int], list[int]]:
    """A sample in the evaluation's format with its answer appended, and which tokens are the answer's (the first marked 2)."""
    task, size = TASKS[name], max(TASKS[name].min_size, length // 6)
    while True:
        rng = random.Random(f"{name} {length} {seed}")
        hay = task.build(rng, size, bundled_filler(task.filler)(rng))
        context = encoder(f"{INTRO}{' '.join(hay.units)}\n")
        asked, answer = encoder(hay.questions[0].text), encoder(f" {hay.questions[0].answer}\n")
        total = len(context) + len(asked) + len(answer)
        if total <= length:
            ids = context + asked + answer
            return ids + [encoder.eos] * (length - total), [0] * (total - len(answer)) + [2] + [1] * (
                len(answer) - 1
            ) + [0] * (length - total)
        size = max(2, int(size * 0.98 * length / total))


def measure(directory: Path, length: int, seconds: float) -> dict[str, float]:
    """Tokens per second of one process."""
    docs, tokens, start = Documents(Encoder(directory), 1), 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        tokens += len(docs.row(length)[0])
    return {"length": length, "tokens_per_s": tokens / (time.perf_counter() - start)}


if __name__ == "__main__":
    for n in (256, 1024, 4096, 16384):
        print(json.dumps(measure(Path("src/topmass/assets/reference"), n, 5)))
