"""Counters at vLLM's `/metrics`: the engine's process writes them to a file, the process that is asked reads it.

vLLM answers `/metrics` in another process than the one in which attention runs. Prometheus' client has files for that. With one
API server vLLM does not use them, so a folder of ours is read beside its registry; with several it does, and its folder is ours.
"""

import atexit
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from topmass.integrations.vllm.receipts import Receipts

__all__ = ["HELP", "Counters", "expose", "samples"]

# set by the process that is asked, inherited by those that count
_OURS, _THEIRS = "TOPMASS_METRICS_DIR", "PROMETHEUS_MULTIPROC_DIR"
_owners: set[int] = set()

HELP = {
    "topmass:requests": "Requests that ended.",
    "topmass:generated_queries": "Queries past the prompt.",
    "topmass:sparse_queries": "Queries that read a support, by layer.",
    "topmass:dense_queries": "Queries of prompts that read every key, by layer and reason.",
    "topmass:keys_read": "Keys that sparse queries, and dense ones of prompts, read, by layer; at most so many with a mass budget.",
    "topmass:kernel_calls": "Calls of sparse kernels, by backend.",
    "topmass:selection_calls": "Calls that chose keys, by op and backend.",
}
"""What each counter means; Prometheus adds `_total` to a name."""

Labels = tuple[tuple[str, str], ...]


def samples(receipts: Receipts) -> Iterator[tuple[str, Labels, int]]:
    """Name, labels and value of every counter.

    Example:
        >>> receipts = Receipts({3: None})
        >>> receipts.ran("triton")
        >>> [s for s in samples(receipts) if s[2]]
        [('topmass:kernel_calls', (('backend', 'triton'),), 1)]
    """
    yield "topmass:requests", (), receipts.requests
    yield "topmass:generated_queries", (), receipts.total.generated
    for layer, count in receipts.total.layers.items():
        where = (("layer", str(layer)),)
        yield "topmass:sparse_queries", where, count.sparse
        yield "topmass:keys_read", where, count.keys
        for reason, queries in count.dense.items():
            yield "topmass:dense_queries", (*where, ("reason", reason)), queries
    for backend, calls in receipts.backends.items():
        yield "topmass:kernel_calls", (("backend", backend),), calls
    for chosen, calls in receipts.selection.items():
        op, backend = chosen.split("=")
        yield "topmass:selection_calls", (("backend", backend), ("op", op)), calls


class Counters:
    """The counters of one engine, in a file of its process.

    Args:
        labels: Labels of every counter, such as `model_name`.
    """

    def __init__(self, folder: str | Path, labels: Mapping[str, str]) -> None:
        from prometheus_client.mmap_dict import MmapedDict  # pyright: ignore[reportMissingImports]

        # several engines of one process must not share a file, which is read when it is opened and never again
        handle, path = tempfile.mkstemp(prefix=f"counter_topmass-{os.getpid()}-", suffix=".db", dir=folder)
        os.close(handle)
        self._file: Any = MmapedDict(path)
        self._labels = dict(labels)
        self._known: dict[tuple[str, Labels], tuple[str, int]] = {}

    def write(self, receipts: Receipts) -> None:
        """Bring the file up to date."""
        now = time.time()
        for name, labels, value in samples(receipts):
            key, before = self._known.get((name, labels), ("", -1))
            if value != before:
                key = key or self._key(name, labels)
                self._file.write_value(key, float(value), now)
                self._known[name, labels] = key, value

    def _key(self, name: str, labels: Labels) -> str:
        return json.dumps([name, f"{name}_total", {**self._labels, **dict(labels)}, HELP[name]], sort_keys=True)

    @classmethod
    def here(cls, labels: Mapping[str, str]) -> "Counters | None":
        """Counters where the process that answers `/metrics` looks; `None` if nobody does."""
        folder = os.environ.get(_THEIRS) or os.environ.get(_OURS)
        return cls(folder, labels) if folder and Path(folder).is_dir() else None


def expose() -> None:
    """Show what engines of this process and its children count at this process's `/metrics`; may be called again."""
    if _THEIRS in os.environ or os.getpid() in _owners:
        return
    # an engine's process inherits its folder; a server that some other program started does not want that program's
    if multiprocessing.parent_process() is not None and Path(os.environ.get(_OURS, "/nowhere")).is_dir():
        return
    from prometheus_client import REGISTRY  # pyright: ignore[reportMissingImports]
    from prometheus_client.multiprocess import MultiProcessCollector  # pyright: ignore[reportMissingImports]

    folder = tempfile.mkdtemp(prefix="topmass-metrics-")
    os.environ[_OURS] = folder
    _owners.add(os.getpid())
    atexit.register(_remove, folder, os.getpid())
    MultiProcessCollector(REGISTRY, folder)


def _remove(folder: str, owner: int) -> None:
    # a forked child runs this, too
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)
        os.environ.pop(_OURS, None)
