"""What really ran: counts per request and layer, and totals for the log."""

import atexit
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from topmass.core.rule import SupportRule
from topmass.errors import DataError
from topmass.integrations.vllm.batch import Batch, Part, keys_read, within

__all__ = ["LayerCount", "Receipts", "RequestReceipt"]

KEPT_DENSE = "kept dense by the plan, or without an indexer"


@dataclass(slots=True, kw_only=True)
class LayerCount:
    """What the rows of a request did in one layer.

    Attributes:
        sparse: Queries that read a support.
        dense: Queries of the prompt (and generated ones, if they select) that read every key, by reason.
        keys: Keys that both read; with a mass budget the most that they may have read.
    """

    sparse: int = 0
    dense: dict[str, int] = field(default_factory=dict)
    keys: int = 0

    @classmethod
    def of(cls, rule: SupportRule | None, part: Part) -> "LayerCount":
        """What the rows of a part do in a layer with this rule."""
        if rule is None:
            dense = part.stop - part.start
            return cls(dense={KEPT_DENSE: dense}, keys=(part.start + 1 + part.stop) * dense // 2)
        served = rule.per_query() if part.generated else rule
        sparse, dense, keys = keys_read(served, part.start, part.stop)
        return cls(sparse=sparse, dense={within(rule): dense} if dense else {}, keys=keys)

    def add(self, other: "LayerCount") -> None:
        """Count the rows of another part."""
        self.sparse += other.sparse
        self.keys += other.keys
        for reason, queries in other.dense.items():
            self.dense[reason] = self.dense.get(reason, 0) + queries


@dataclass(slots=True, kw_only=True)
class RequestReceipt:
    """What one request did.

    Attributes:
        request: Its id.
        generated: Queries past the prompt, which read every key unless `decode="sparse"`.
        layers: Counts by layer index. Positions from the prefix cache are not computed, and not counted; those that
            preemption computes again count again.
    """

    request: str
    generated: int = 0
    layers: dict[int, LayerCount] = field(default_factory=dict)

    def __str__(self) -> str:
        queries = sum(c.sparse + sum(c.dense.values()) for c in self.layers.values())
        if not queries:
            return f"request {self.request}: {self.generated} generated queries, no prompt query"
        sparse = sum(c.sparse for c in self.layers.values())
        keys = sum(c.keys for c in self.layers.values())
        return (
            f"request {self.request}: {100 * sparse / queries:.1f} % of its queries sparse, {keys / queries:.1f} keys a query, "
            f"{self.generated} generated queries"
        )


class Receipts:
    """Counts every batch, and hands out a receipt when a request has finished.

    Attributes:
        backends: Kernel backends of the sparse attention, with the number of calls.
        selection: What chose the keys, `op=backend`, with the number of calls.

    Args:
        rules: Support rule by layer index; `None` for a layer that stays dense.
        path: File that receipts are appended to. `None` writes none.
        say: Called with each line for the log.
        log_every: Seconds between two lines with the totals; 0 logs none.

    Raises:
        DataError: `path` cannot be written.
    """

    def __init__(
        self,
        rules: Mapping[int, SupportRule | None],
        *,
        path: str | None = None,
        say: Callable[[str], Any] | None = None,
        log_every: float = 0.0,
    ) -> None:
        self.rules = dict(rules)
        self.backends: dict[str, int] = {}
        self.selection: dict[str, int] = {}
        self.total = RequestReceipt(request="total", layers={i: LayerCount() for i in self.rules})
        self.requests = 0
        self._open: dict[str, RequestReceipt] = {}
        self._path, self._say, self._every = path, say, log_every
        self._said = time.monotonic()
        if path is not None:
            # vLLM tells of a finished request with the next batch, which may never come
            atexit.register(self.close)
            try:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                Path(path).touch()
            except OSError as error:
                raise DataError(f"Receipts cannot be written to {path}: {error.strerror}.") from error

    def add(self, batch: Batch) -> None:
        """Count the rows of one forward."""
        for part in batch.parts:
            one = self._open.setdefault(part.request, RequestReceipt(request=part.request))
            if part.generated:
                one.generated += part.stop - part.start
                self.total.generated += part.stop - part.start
                if not batch.sparse_decode:
                    continue
            # most layers have one rule, and to count is not free
            counts = {rule: LayerCount.of(rule, part) for rule in set(self.rules.values())}
            for layer, rule in self.rules.items():
                one.layers.setdefault(layer, LayerCount()).add(counts[rule])
                self.total.layers[layer].add(counts[rule])

    def ran(self, backend: str, selection: Mapping[str, str] | None = None) -> None:
        """Count one call of a kernel backend, and what chose its keys: the backend by op."""
        self.backends[backend] = self.backends.get(backend, 0) + 1
        for op, name in (selection or {}).items():
            self.selection[f"{op}={name}"] = self.selection.get(f"{op}={name}", 0) + 1

    def finish(self, requests: Iterable[str]) -> list[RequestReceipt]:
        """Receipts of requests that ended, written to the file and logged."""
        done = [self._open.pop(r) for r in requests if r in self._open]
        self.requests += len(done)
        if done and self._path is not None:
            with Path(self._path).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(receipt)) + "\n" for receipt in done)
        self._log()
        return done

    def close(self) -> None:
        """Receipts of the requests that are still open."""
        self.finish(list(self._open))

    def summary(self) -> dict[str, Any]:
        """The totals, as JSON values."""
        return {"requests": self.requests, "backends": self.backends, "selection": self.selection, **asdict(self.total)}

    def _log(self) -> None:
        now = time.monotonic()
        if self._say is None or not self._every or now - self._said < self._every:
            return
        self._said = now
        kernels, chosen = (
            ", ".join(f"{name} x {calls}" for name, calls in sorted(table.items())) or "none"
            for table in (self.backends, self.selection)
        )
        line = str(self.total).removeprefix("request total: ")
        self._say(
            f"topmass: {self.requests} requests finished; {line}; sparse kernels: {kernels}; selected by {chosen}"
        )
