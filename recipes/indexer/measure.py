"""One run of the comparison: its samples, its rows, and what happens when the time is over."""

import argparse
import json
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import Known, Library, blocks
from found import means

from topmass.eval.runner import evaluate_samples
from topmass.eval.settings import Infeasible
from topmass.integrations.transformers.load import describe_device, weights_hash
from topmass.integrations.transformers.reference import load_reference
from topmass.results import Run, finish_partial, make_manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One run: what is measured on how many haystacks of which tasks.

    Attributes:
        part: Name of the part; the run lies in `PART-LENGTH`.
        length: Tokens of prompt and answer.
        tasks: Names.
        seed: Seed of the samples.
        selectors: By label.
        counts: Haystacks per task by label.
        facts: What else identifies the run.
    """

    part: str
    length: int
    tasks: tuple[str, ...]
    seed: int
    selectors: Mapping[str, Any]
    counts: Mapping[str, int]
    facts: Mapping[str, Any]

    def config(self) -> dict[str, Any]:
        """What must not change when the run resumes."""
        described = {
            name: dict(s.settings) if isinstance(s, Infeasible) else s.config() for name, s in self.selectors.items()
        }
        fixed = {"part": self.part, "length": self.length, "tasks": self.tasks, "haystacks": dict(self.counts)}
        return {**fixed, "selectors": described, **self.facts}


class Bench:
    """The model, the processes that write samples, and the clock."""

    def __init__(self, args: argparse.Namespace, pool: ProcessPoolExecutor) -> None:
        self.args, self.pool, self.begin = args, pool, time.time()
        self.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model: Any = None

    def load(self) -> None:
        """Load the model, once the pool has its first jobs."""
        if self.model is None:
            self.model, tokenizer = load_reference(device=self.device)
            self.known = Known(tokenizer)
            self.hash = weights_hash(self.model)

    def late(self) -> bool:
        """Whether the time is over."""
        return time.time() - self.begin >= self.args.seconds

    def tick(self, *_: Any) -> None:
        """Stop when the time is over."""
        if self.late():
            raise TimeoutError

    def measure(self, work: Work) -> bool:
        """Do what is left of one run; whether it is complete, or closed."""
        path = self.args.out / f"{work.part}-{work.length}"
        if path.is_dir():
            print(f"{path} is complete", flush=True)
            return True
        library = Library(self.pool, seed=work.seed)
        jobs = list(blocks(work.length, list(work.counts.values()), self.args.batch_tokens))
        if not self.late():
            for lo, hi in jobs:
                for task in work.tasks:
                    library.order(task, work.length, lo, hi - lo)
            self.load()
        # a run that is opened logs an attempt, and nothing would be measured in this one
        if self.late():
            print(f"{path}: out of time before it began", flush=True)
            return self.args.close and close(path)
        manifest = make_manifest(
            "eval", work.config(), model="reference", weights_hash=self.hash, seeds={"tasks": work.seed},
            device=describe_device(self.model),
        )  # fmt: skip
        with Run.open(path, manifest) as run:
            try:
                for lo, hi in jobs:
                    self._block(work, library, run, lo, hi)
                run.finish()
                return True
            except TimeoutError:
                print(f"{path}: out of time after {len(run.rows)} rows; the same command resumes", flush=True)
        return self.args.close and close(path)

    def _block(self, work: Work, library: Library, run: Run, lo: int, hi: int) -> None:
        start = time.time()
        chosen = {name: s for name, s in work.selectors.items() if work.counts[name] >= hi}
        waited = 0.0
        for task in work.tasks:
            keys = [(task, work.length, work.seed, h, 0, name) for h in range(lo, hi) for name in chosen]
            if all(map(run.done, keys)):
                continue
            self.tick()
            asked = time.time()
            samples = library.take(self.known, task, work.length, lo, hi - lo)
            waited += time.time() - asked
            evaluate_samples(
                self.model,
                self.known,
                samples,
                selectors=chosen,
                batch_tokens=work.length * len(samples),
                run=run,
                progress=self.tick,
            )
        rows = [r for r in run.rows if lo <= r["haystack"] < hi]
        print(
            f"{work.part} {work.length} haystacks {lo}..{hi - 1}, {time.time() - start:.1f} s, {waited:.1f} s of them for text: "
            + ", ".join(f"{name} {100 * score:.1f}" for name, score in means(rows).items()),
            flush=True,
        )


def close(path: Path) -> bool:
    """Publish what there is of an unfinished run, described as when it was measured; whether there is anything."""
    partial = path.with_name(f"{path.name}.partial")
    journal = partial / "journal.jsonl"
    # what follows the last line break was half written
    lines = journal.read_bytes().split(b"\n")[:-1] if journal.is_file() else []
    rows = sum(len(json.loads(line)) for line in lines)
    if not rows:
        print(f"{path} has no rows that could be published", flush=True)
        return False
    config = json.loads((partial / "manifest.json").read_text())["config"]
    asked = len(config["tasks"]) * sum(config["haystacks"].values())
    notes: dict[str, Any] = {"stopped": f"out of time after {rows:,} rows"} if rows < asked else {}
    finish_partial(path, **notes)
    print(f"{path} is published with {rows:,} of {asked:,} rows", flush=True)
    return True
