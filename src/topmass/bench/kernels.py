"""One attention layer, dense and sparse, stage by stage: from q, k, v and the indexer's tensors to the output."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch

from topmass.bench import gates
from topmass.bench.baselines import baselines_for
from topmass.bench.inputs import TILE, Inputs, drifting_queries, find_keep, make_inputs
from topmass.bench.kernel_cases import Case, Entry, kl_case, layer_case, oracle_case
from topmass.bench.shapes import Shape, shape_of
from topmass.bench.timing import FLUSH_BYTES, time_rounds
from topmass.core.budget import Budget, BudgetLike
from topmass.core.granularity import Granularity
from topmass.core.rule import SupportRule
from topmass.errors import ConfigError
from topmass.results import Run

__all__ = ["Setting", "What", "bench_kernels"]

What = Literal["layer", "oracle", "kl"]

# how far a prompt without an asked growth drifts: neighbours correlate by this much
KEEP = 0.99
# sizes of the ceilings: bytes copied and edge of the matrices
COPY_BYTES, EDGE = 2**31, 8192

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is timed at every length.

    Attributes:
        shape: Name of a shape, or `16/4x256`.
        budget: Keys per query: tokens or `5%`.
        q_block: Queries that share one selection.
        kv_block: Keys taken together.
        dim: Width of the indexer's queries and keys.
        backend: Kernels of `index_topk`, `tile_union` and the others. `None`: `triton` on CUDA, `reference` on CPU.
        rounds: Times that everything is timed.
        seed: Seed of the inputs.
        device: `cuda`, or `cpu` for plain PyTorch.

    Raises:
        ConfigError: A value is out of range, or the device is not there.
    """

    shape: str = "qwen3.5-9b"
    budget: BudgetLike = 2048
    q_block: int = 32
    kv_block: int = 1
    dim: int = 128
    backend: str | None = None
    rounds: int = 7
    seed: int = 0
    device: str = "cuda"

    def __post_init__(self) -> None:
        if self.dim < 1 or self.rounds < 1:
            raise ConfigError(f"dim and rounds must be at least 1, got {self.dim} and {self.rounds}.")
        if Budget.parse(self.budget).mass is not None:
            raise ConfigError("A budget of mass reads as many keys as the inputs say: time tokens (2048) or '5%'.")
        if torch.device(self.device).type not in ("cuda", "cpu"):
            raise ConfigError(f"Kernels are timed on cuda or cpu, got {self.device!r}.")
        if torch.device(self.device).type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(
                "bench kernels found no CUDA GPU: run it where there is one, or time plain PyTorch with --device cpu."
            )
        _ = self.layer, self.rule

    @property
    def layer(self) -> Shape:
        """The shape."""
        return shape_of(self.shape)

    @property
    def rule(self) -> SupportRule:
        """The support rule."""
        granularity = Granularity(q_block=self.q_block, kv_block=self.kv_block)
        return SupportRule(budget=Budget.parse(self.budget), granularity=granularity)

    @property
    def on_gpu(self) -> bool:
        """Whether kernels are timed, not plain PyTorch."""
        return torch.device(self.device).type == "cuda"

    @property
    def kernels(self) -> str:
        """The backend that runs."""
        return self.backend or ("triton" if self.on_gpu else "reference")

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the inputs."""
        if self.on_gpu:
            return torch.bfloat16
        # Triton's interpreter truncates bfloat16
        return torch.float32 if self.kernels == "reference" else torch.float16

    def label(self, growth: float | None) -> str:
        """Short name of a configuration."""
        return f"b={self.budget} {self.rule.granularity}" + ("" if growth is None else f" u={growth:g}")


def bench_kernels(
    setting: Setting,
    *,
    lengths: Iterable[int],
    what: Iterable[What] = ("layer",),
    growths: Iterable[float] = (),
    run: Run | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Time a layer at several lengths; return records of the kind `bench`.

    Everything of one length, and every growth of it, is timed in the same interleaved rounds, after all of it has been
    checked; the dense kernels' times are in the records of each growth.

    Args:
        setting: Shape, budget, granularity, device.
        lengths: Prompt lengths, tokens.
        what: `layer` is index, union, attend and all of it; `oracle` the exact selection by attention mass; `kl` the
            indexer's loss with its gradient.
        growths: For `layer` with fewer than 32 queries sharing: the union growth U/K of the inputs, each on its own
            inputs. None: one walk that drifts at a fixed rate.
        run: Keeps the records; what it has is not timed again.
        progress: Called with done, total and what is next.

    Raises:
        ConfigError: A length or a growth cannot be had.
        AssertionError: A result is wrong, so that its time means nothing.
        BackendUnavailableError: A kernel cannot run this shape.
    """
    lengths, what, growths = list(dict.fromkeys(lengths)), list(dict.fromkeys(what)), list(dict.fromkeys(growths))
    _check(setting, lengths, what, growths)
    cases: list[tuple[int, What]] = [(n, w) for n in lengths for w in what]
    rows: list[dict[str, Any]] = []
    for i, (length, target) in enumerate(cases):
        if progress is not None:
            progress(i, len(cases), f"{target} at {length}")
        asked: list[float | None] = [*growths] if target == "layer" and growths else [None]
        wanted = [u for u in asked if not _done(run, setting, length, target, u)]
        if not wanted:
            continue
        for found in _measure(setting, length, target, wanted):
            if run is not None:
                run.append(found)
            rows += found
    return rows


def _done(run: Run | None, setting: Setting, length: int, what: What, growth: float | None) -> bool:
    return run is not None and run.done((setting.layer.name, length, what, setting.label(growth)))


def _check(setting: Setting, lengths: list[int], what: list[What], growths: list[float]) -> None:
    if not lengths or min(lengths) < setting.kv_block:
        raise ConfigError(f"Lengths must be at least one key group of {setting.kv_block} tokens, got {lengths}.")
    if unknown := [w for w in what if w not in get_args(What)] or ([] if what else ["nothing"]):
        raise ConfigError(f"what must be of {', '.join(get_args(What))}, got {unknown[0]!r}.")
    if any(not u >= 1 for u in growths):
        raise ConfigError(f"Union growth is at least 1, got {min(growths)}.")
    if growths and "layer" not in what:
        raise ConfigError("Union growth concerns what='layer' only: leave it out, or time the layer too.")
    if growths and setting.q_block >= TILE:
        raise ConfigError(
            f"Where {setting.q_block} queries share a selection the union does not grow: leave growth out."
        )


def _measure(
    setting: Setting, length: int, what: What, growths: Sequence[float | None]
) -> Iterator[list[dict[str, Any]]]:
    """Records of every growth; they differ in the indexer's queries alone."""
    inputs = _inputs(setting, length)
    dense, passed, absent = _dense_entries(setting, inputs)
    cases = {u: _case(setting, _at_growth(setting, inputs, u), what) for u in growths}
    entries = {("", name): entry for name, entry in (_ceilings(setting) | dense).items()}
    entries |= {(setting.label(u), name): entry for u, case in cases.items() for name, entry in case.entries.items()}
    checks = {(setting.label(u), name): check for u, case in cases.items() for name, check in case.checks.items()}
    timings = time_rounds(
        {name: entry.run for name, entry in entries.items()},
        gate=lambda: {name: check() for name, check in checks.items()},
        rounds=setting.rounds,
        # the check ran them
        warm={("", name) for name in dense},
        device=setting.device,
        flush_bytes=FLUSH_BYTES,
    )
    gate = timings.gate | {("", name): metrics for name, metrics in passed.items()}
    for growth, case in cases.items():
        record = _Recorder(setting, length, what, growth)
        for (label, name), entry in entries.items():
            if label in ("", setting.label(growth)):
                record.entry(name, entry, timings.milliseconds[label, name], gate.get((label, name), {}))
        for name, reason in absent.items():
            record.absent(name, reason)
        total = case.entries[what]
        peak = {"peak_memory": (_peak(total.run, setting.device), "GiB")} if setting.on_gpu else {}
        for metric, (value, unit) in (case.facts | peak).items():
            record.add(what, total, metric, value, unit)
        yield record.rows


def _case(setting: Setting, inputs: Inputs, what: What) -> Case:
    if what == "kl":
        return kl_case(inputs, setting.rule.granularity)
    return {"layer": layer_case, "oracle": oracle_case}[what](inputs, setting.rule, setting.kernels)


@dataclass(slots=True)
class _Recorder:
    """Rows of one configuration."""

    setting: Setting
    length: int
    what: str
    growth: float | None
    rows: list[dict[str, Any]] = field(default_factory=list)

    def entry(self, name: str, entry: Entry, milliseconds: list[float], gate: gates.Metrics) -> None:
        """Times of every round, work, and what the check measured."""
        for i, value in enumerate(milliseconds):
            self.add(name, entry, "time", value, "ms", i)
        for metric, value, unit in (("flop", entry.flop, "FLOP"), ("bytes", entry.bytes, "B")):
            if value is not None:
                self.add(name, entry, metric, value, unit)
        for metric, value in gate.items():
            self.add(name, entry, metric, value, "rows" if metric in ("gate_rows", "gate_near_ties") else "")

    def absent(self, name: str, reason: str) -> None:
        """A baseline that is not here."""
        entry = Entry(run=lambda: None, role="dense", backend=name)
        self.add(name, entry, "time", None, "ms", status=reason)

    def add(
        self, name: str, entry: Entry, metric: str, value: float | None, unit: str, i: int = -1, status: str = "ok"
    ) -> None:
        """One row."""
        setting, shape = self.setting, self.setting.layer
        self.rows.append(
            {
                "shape": shape.name,
                "q_heads": shape.q_heads,
                "kv_heads": shape.kv_heads,
                "head_dim": shape.head_dim,
                "length": self.length,
                "what": self.what,
                "config": setting.label(self.growth),
                "budget": str(setting.budget),
                "q_block": setting.q_block,
                "kv_block": setting.kv_block,
                "growth": self.growth,
                "name": name,
                "role": entry.role,
                "backend": entry.backend,
                "round": i,
                "metric": metric,
                "value": value,
                "unit": unit,
                "status": status,
            }
        )


# -- inputs and what everything is compared with


def _inputs(setting: Setting, length: int) -> Inputs:
    return make_inputs(
        setting.layer,
        length,
        kv_block=setting.kv_block,
        dim=setting.dim,
        keep=KEEP,
        seed=setting.seed,
        dtype=setting.dtype,
        device=setting.device,
    )


def _at_growth(setting: Setting, inputs: Inputs, growth: float | None) -> Inputs:
    if growth is None:
        return inputs
    length = inputs.q.shape[1]
    walk = {"length": length, "seed": setting.seed + 1}
    keep = find_keep(inputs.ik, setting.rule, growth=growth, backend=setting.kernels, **walk)
    iq = drifting_queries(length, setting.dim, keep=keep, seed=walk["seed"], like=inputs.q)
    return replace(inputs, iq=iq)


def _dense_entries(
    setting: Setting, inputs: Inputs
) -> tuple[dict[str, Entry], dict[str, gates.Metrics], dict[str, str]]:
    """The dense kernels that run, what the check of each measured, and why the others do not run."""
    there, absent = baselines_for(setting.device)
    n, shape = inputs.q.shape[1], setting.layer
    entries: dict[str, Entry] = {}
    passed: dict[str, gates.Metrics] = {}
    for b in there:
        run = functools.partial(b.run, inputs.q, inputs.k, inputs.v)
        try:
            out = run()
        except (ImportError, RuntimeError) as error:
            # a baseline that refuses the shape, or is built for another PyTorch, costs its row only
            absent[b.name] = f"failed: {' '.join(str(error).split())[:200]}"
            continue
        passed[b.name] = gates.check_dense(inputs, out, setting.rule, b.name)
        flop = 2.0 * shape.q_heads * shape.head_dim * n * (n + 1)
        entries[b.name] = Entry(run=run, role="dense", backend=b.name, flop=flop)
    return entries, passed, absent


def _ceilings(setting: Setting) -> dict[str, Entry]:
    """What the device can do: bytes moved by a copy, products of two matrices in the dtype of the inputs."""
    size, edge = (COPY_BYTES, EDGE) if setting.on_gpu else (2**24, 256)
    source = torch.zeros(size, dtype=torch.uint8, device=setting.device)
    target = torch.zeros_like(source)
    a, b = (torch.randn(edge, edge, device=setting.device).to(setting.dtype) for _ in range(2))
    return {
        "copy": Entry(run=lambda: target.copy_(source), role="ceiling", backend="torch", bytes=2.0 * size),
        "matmul": Entry(run=lambda: a @ b, role="ceiling", backend="torch", flop=2.0 * edge**3),
    }


def _peak(fn: Callable[[], object], device: str) -> float:
    """Memory that a call takes beyond what is there before it, GiB."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    fn()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**30
