"""Time to first token of a whole model: dense kernels, selectors, and the floor under all of them, in interleaved rounds."""

import functools
import gc
import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal, get_args

import torch
from jaxtyping import Int
from torch import Tensor, nn

from topmass.bench.baselines import baselines_for
from topmass.bench.modes import FLOOR, STOCK, Mode, copy_values, dense_mode
from topmass.bench.stress import stress_indexer
from topmass.bench.timing import rotation
from topmass.bench.ttft_clock import prefill, time_prompt
from topmass.bench.ttft_gate import GATE, SINK, check_mode
from topmass.core.budget import Budget
from topmass.core.granularity import Granularity
from topmass.errors import ConfigError
from topmass.eval.settings import Infeasible, columns, label
from topmass.integrations.transformers.index_features import describe_model, index_configs
from topmass.integrations.transformers.linear import fast_linear_attention
from topmass.integrations.transformers.sparsify import LayerReceipt
from topmass.ops.index_topk.interface import Reduce
from topmass.results import Run
from topmass.results.schema import TTFT_METRICS
from topmass.selection import (
    DenseSelector,
    Indexer,
    OracleSelector,
    PooledSelector,
    RandomSelector,
    Selector,
    StreamingSelector,
)
from topmass.selection.base import RankedSelector

__all__ = ["Kind", "Setting", "bench_ttft", "describe_linear", "make_modes", "random_prompts", "text_prompts"]

Kind = Literal["indexer", "streaming", "pooled", "random", "oracle"]
Progress = Callable[[int, int, str], None]
Prompts = Callable[[int, int], Int[Tensor, "batch len"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Which ways to attend are timed, and how.

    Attributes:
        selectors: What chooses keys; `oracle` is a diagnostic, dearer than dense attention.
        budgets: Keys per query.
        q_blocks: Queries that share one selection.
        kv_blocks: Keys taken together; none means the indexers' own, or 1.
        reduces: How indexers score queries that share, see `index_topk`; none means as they say themselves.
        dense: Dense kernels, `stock` for the model as it is; `None` means that and all that the device has.
        dense_below: Positions up to this length attend densely.
        chunk: Tokens of a prompt computed in one forward; 0 means all of them.
        new_tokens: Tokens generated after each prompt, for the time per output token; 0 for none.
        rounds: Times that everything is timed.
        backend: Sparse kernels: `auto`, or a name that never falls back.
        dim: Width of an untrained indexer's queries and keys.
        random_weights: The model's weights are random, so that an untrained indexer is a `stress_indexer`.

    Raises:
        ConfigError: A value is out of range.
    """

    selectors: tuple[Kind, ...] = ("indexer",)
    budgets: tuple[str, ...] = ("2048",)
    q_blocks: tuple[int, ...] = (32,)
    kv_blocks: tuple[int, ...] = ()
    reduces: tuple[Reduce, ...] = ()
    dense: tuple[str, ...] | None = None
    dense_below: int = 0
    chunk: int = 0
    new_tokens: int = 8
    rounds: int = 5
    backend: str = "auto"
    dim: int = 128
    random_weights: bool = False

    def __post_init__(self) -> None:
        for name, least in (("rounds", 1), ("dim", 1), ("chunk", 0), ("new_tokens", 0), ("dense_below", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        for kind in self.selectors:
            if kind not in get_args(Kind):
                raise ConfigError(f"Selectors to time are {', '.join(get_args(Kind))}; got {kind!r}.")
        for budget in self.budgets:
            Budget.parse(budget)
        for g, r in product(self.q_blocks or (1,), self.kv_blocks or (1,)):
            Granularity(q_block=g, kv_block=r)
        if self.chunk and (wrong := [g for g in self.q_blocks if self.chunk % g]):
            raise ConfigError(f"chunk={self.chunk} splits query blocks of {wrong[0]}; give a multiple of it.")


@dataclass(slots=True, kw_only=True)
class _Measured:
    """What one mode gave for one prompt shape."""

    rounds: dict[str, list[float]] = field(default_factory=dict)
    once: dict[str, float] = field(default_factory=dict)
    layers: Sequence[LayerReceipt] = ()
    status: str = "ok"


def bench_ttft(
    model: nn.Module,
    setting: Setting,
    *,
    lengths: Iterable[int],
    batches: Iterable[int] = (1,),
    prompts: Prompts,
    indexers: Sequence[Indexer] = (),
    more: Sequence[Selector] = (),
    run: Run | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Time the first token of prompts of several shapes; return records of the kind `ttft`.

    Every way to attend answers the same prompts, interleaved round by round, once all of them have been checked against the
    model with attention in float64. A time runs from ids on the device to the last token's logits on the host.

    Args:
        model: In eval mode, on the device.
        lengths: Prompt lengths, tokens.
        batches: Prompts computed together.
        prompts: Gives ids for a batch and a length, on the model's device.
        indexers: Trained ones; none means an untrained one for each of `kv_blocks`.
        more: Selectors to time beside those of `setting`.
        run: Keeps the records; what it has is not timed again.
        progress: Called with done, total and what is next.

    Raises:
        AssertionError: A result is wrong, so that its time means nothing.
        ConfigError: Lengths or settings cannot be.
        BackendUnavailableError: A kernel asked for by name cannot run.
    """
    cases = [(n, b) for n in dict.fromkeys(lengths) for b in dict.fromkeys(batches)]
    if not cases or min(map(min, cases)) < 1:
        raise ConfigError(f"Lengths and batches must be at least 1, got {cases}.")
    _check_positions(model, max(n for n, _ in cases) + setting.new_tokens)
    modes, absent = make_modes(model, setting, indexers, more)
    rows: list[dict[str, Any]] = []
    with torch.inference_mode(), fast_linear_attention(model):
        gate = prompts(1, min(GATE, min(n for n, _ in cases)))
        checked, refused = _check_all(model, modes, gate, setting)
        modes = {name: mode for name, mode in modes.items() if name not in refused}
        for i, (length, batch) in enumerate(cases):
            if progress is not None:
                progress(i, len(cases), f"{length} tokens, batch {batch}")
            if run is not None and run.done((length, batch)):
                continue
            found = _measure(model, modes, prompts(batch, length), setting)
            new = _records(modes, found, checked, {**absent, **refused}, length, batch, setting)
            if run is not None:
                run.append(new)
            rows += new
    return rows


def _check_positions(model: Any, positions: int) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and positions > limit:
        raise ConfigError(
            f"Prompt and generated tokens reach {positions} positions, the model has {limit}; give shorter lengths."
        )


def describe_linear(model: Any) -> str:
    """Which kernels the model's linear-attention layers run, in words; empty without such layers."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    if "linear_attention" not in kinds:
        return ""
    rule = "flash-linear-attention" if importlib.util.find_spec("fla") else "the gated delta rule in plain PyTorch"
    conv = "causal_conv1d" if importlib.util.find_spec("causal_conv1d") else "the convolution in plain PyTorch"
    return f"{rule}, {conv}"


def make_modes(
    model: nn.Module, setting: Setting, indexers: Sequence[Indexer] = (), more: Sequence[Selector] = ()
) -> tuple[dict[str, Mode], dict[str, tuple[Mode | Infeasible, str]]]:
    """Ways to attend by name, and those that cannot be with the reason.

    Raises:
        ConfigError: A dense kernel is unknown, or no selector is left.
    """
    device = next(model.parameters()).device
    there, reasons = baselines_for(device)
    known = [STOCK, *(b.name for b in there), *reasons]
    wanted = known if setting.dense is None else setting.dense
    if unknown := set(wanted) - set(known):
        raise ConfigError(f"Unknown dense kernel {min(unknown)!r} on {device.type}; known: {', '.join(known)}.")
    modes = {name: dense_mode(name) for name in wanted if name not in reasons}
    absent: dict[str, tuple[Mode | Infeasible, str]] = {n: (dense_mode(n), reasons[n]) for n in wanted if n in reasons}
    for selector in (*_selectors(model, setting, indexers), *more):
        name = _name(selector, indexers)
        if isinstance(selector, Infeasible):
            absent[name] = selector, f"infeasible: {selector.reason}"
        else:
            modes[name] = Mode(name=name, role="sparse", selector=selector, backend=setting.backend)
    if len(absent) and not any(m.role == "sparse" for m in modes.values()) and setting.selectors:
        raise ConfigError(next(reason for _, reason in reversed(absent.values())).removeprefix("infeasible: "))
    modes[FLOOR] = Mode(name=FLOOR, role="floor", attend=copy_values)
    return modes, absent


def random_prompts(model: Any, seed: int = 0) -> Prompts:
    """Token ids at random, for a model whose weights are random too."""
    size = model.config.get_text_config().vocab_size
    device = next(model.parameters()).device

    def draw(batch: int, length: int) -> Int[Tensor, "batch len"]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, size, (batch, length), generator=generator).to(device)

    return draw


def text_prompts(model: Any, tokenizer: Any, seed: int = 0) -> Prompts:
    """Text of the evaluation's needle task, cut to the exact length."""
    from topmass.eval.tasks import make_samples

    device = next(model.parameters()).device

    def write(batch: int, length: int) -> Int[Tensor, "batch len"]:
        rows = []
        # a task leaves room for its answer, and short lengths hold no task at all
        samples = make_samples("niah_single", tokenizer, length=max(length + 256, 1024), n=batch, seed=seed)
        for sample in samples:
            ids = tokenizer(sample.context + sample.question)["input_ids"]
            rows.append((ids * (length // len(ids) + 1))[-length:])
        return torch.tensor(rows, device=device)

    return write


# -- selectors


def _selectors(model: nn.Module, setting: Setting, indexers: Sequence[Indexer]) -> Iterator[Selector | Infeasible]:
    blocks = setting.kv_blocks or (1,)
    trained = list(indexers)
    if "indexer" in setting.selectors and not trained:
        fingerprint, _ = describe_model(model)
        make = stress_indexer if setting.random_weights else Indexer.create
        trained = [make(index_configs(model, dim=setting.dim, kv_block=r), fingerprint) for r in blocks]
    for kind in dict.fromkeys(setting.selectors):
        for budget in dict.fromkeys(setting.budgets):
            if kind == "streaming":
                yield _made(kind, budget, Granularity(), lambda b=budget: _streaming(b))
                continue
            for g in dict.fromkeys(setting.q_blocks):
                if kind == "indexer":
                    ways = (setting.reduces if g > 1 else ()) or (None,)
                    yield from (_indexer(x, how, budget, g, setting) for x in trained for how in dict.fromkeys(ways))
                    continue
                for r in dict.fromkeys(setting.kv_blocks or (_POOLED if kind == "pooled" else 1,)):
                    unit = Granularity(q_block=g, kv_block=r)
                    build = functools.partial(_RANKED[kind], granularity=unit, dense_below=setting.dense_below)
                    yield _made(kind, budget, unit, lambda b=budget, build=build: build(budget=b))


# the block-pooled selector's own default
_POOLED = PooledSelector(budget=2048).granularity.kv_block
_RANKED: dict[str, type[RankedSelector]] = {
    "oracle": OracleSelector,
    "pooled": PooledSelector,
    "random": RandomSelector,
}


def _indexer(
    indexer: Indexer, reduce: Reduce | None, budget: str, q_block: int, setting: Setting
) -> Selector | Infeasible:
    indexer = indexer if reduce is None else indexer.reducing(reduce)
    unit = Granularity(q_block=q_block, kv_block=indexer.info.kv_block)
    return _made(
        "indexer" if indexer.info.training_tokens else "untrained",
        budget,
        unit,
        lambda: indexer.selector(budget=budget, granularity=unit, dense_below=setting.dense_below),
    )


def _streaming(budget: str) -> Selector:
    if not budget.isdigit():
        raise ConfigError(f"The streaming selector takes a budget in tokens, got {budget!r}.")
    sink = min(SINK, int(budget) // 2)
    return StreamingSelector(sink=sink, window=int(budget) - sink)


def _made(kind: str, budget: str, unit: Granularity, build: Callable[[], Selector]) -> Selector | Infeasible:
    try:
        return build()
    except ConfigError as error:
        config = {"selector": kind, "budget": budget, "q_block": unit.q_block, "kv_block": unit.kv_block}
        return Infeasible(settings=config, reason=str(error))


def _name(selector: Selector | Infeasible, indexers: Sequence[Indexer]) -> str:
    text = label(selector)
    # two indexers of one shape need two names
    several = len({i.info.kv_block for i in indexers}) < len(indexers)
    own = {} if isinstance(selector, Infeasible) else selector.config()
    return f"{text} {own['indexer'][:6]}" if several and "indexer" in own else text


# -- the check, and the rounds


def _check_all(
    model: nn.Module, modes: Mapping[str, Mode], ids: Int[Tensor, "1 len"], setting: Setting
) -> tuple[dict[str, dict[str, float]], dict[str, tuple[Mode | Infeasible, str]]]:
    """Errors by mode; dense kernels that cannot run this model, with the reason."""
    checked, refused = {}, {}
    for name, mode in modes.items():
        if mode.role == "floor":
            continue
        try:
            checked[name] = check_mode(model, mode, ids)
            if setting.chunk and ids.shape[1] > 1 and mode.role == "dense":
                with mode.running(model):
                    prefill(model, ids, -(-ids.shape[1] // 2))
        except (ImportError, RuntimeError) as error:
            if mode.role == "sparse":
                raise
            # a baseline that refuses the shape or the chunks costs its row only
            refused[name] = mode, f"failed: {' '.join(str(error).split())[:200]}"
    return checked, refused


def _measure(
    model: nn.Module, modes: Mapping[str, Mode], ids: Int[Tensor, "batch len"], setting: Setting
) -> dict[str, _Measured]:
    found = {name: _first(model, mode, ids, setting) for name, mode in modes.items()}
    live = [name for name, one in found.items() if one.status == "ok"]
    for i in range(setting.rounds):
        for name in rotation(live, i):
            values, _, _ = time_prompt(model, modes[name], ids, chunk=setting.chunk, new_tokens=setting.new_tokens)
            for metric, value in values.items():
                found[name].rounds.setdefault(metric, []).append(value)
    return found


def _first(model: nn.Module, mode: Mode, ids: Int[Tensor, "batch len"], setting: Setting) -> _Measured:
    """An untimed call: compiles and tunes kernels, and says what does not change between rounds."""
    try:
        _, layers, once = time_prompt(model, mode, ids, chunk=setting.chunk, new_tokens=setting.new_tokens)
    except torch.OutOfMemoryError:
        layers, once = (), None
    if once is None:
        # only here, where the error no longer holds on to the tensors of its frames
        gc.collect()
        torch.cuda.empty_cache()
        return _Measured(status=f"out of memory at {ids.shape[0]} x {ids.shape[1]} tokens")
    if layers:
        once["keys_read_mean"] = sum(x.keys_read_mean for x in layers) / len(layers)
    return _Measured(once=once, layers=layers)


# -- records


def _records(
    modes: Mapping[str, Mode],
    found: Mapping[str, _Measured],
    checked: Mapping[str, Mapping[str, float]],
    absent: Mapping[str, tuple[Mode | Infeasible, str]],
    length: int,
    batch: int,
    setting: Setting,
) -> list[dict[str, Any]]:
    where = {"length": length, "batch": batch, "chunk": setting.chunk}
    rows: list[dict[str, Any]] = []
    for name, one in found.items():
        fixed = where | _identity(name, modes[name]) | _ran(modes[name], one.layers) | {"status": one.status}
        if one.status != "ok":
            rows.append(_row(fixed, "ttft", None))
            continue
        for metric, values in one.rounds.items():
            rows += [_row(fixed, metric, value, i) for i, value in enumerate(values)]
        rows += [_row(fixed, metric, value) for metric, value in {**one.once, **checked.get(name, {})}.items()]
    for name, (what, reason) in absent.items():
        fixed = where | _identity(name, what) | {"backend": "", "receipt": "", "status": reason}
        rows.append(_row(fixed, "ttft", None))
    return rows


def _row(fixed: Mapping[str, Any], metric: str, value: float | None, i: int = -1) -> dict[str, Any]:
    return {**fixed, "metric": metric, "value": value, "unit": TTFT_METRICS[metric][0], "round": i}


def _identity(name: str, what: Mode | Infeasible) -> dict[str, Any]:
    selector = what if isinstance(what, Infeasible) else what.selector or DenseSelector()
    role = "sparse" if isinstance(what, Infeasible) else what.role
    config = selector.settings if isinstance(selector, Infeasible) else selector.config()
    real = not isinstance(selector, Infeasible) and role != "floor"
    return {
        "name": name,
        "role": role,
        **columns(selector),
        **({"selector": FLOOR} if role == "floor" else {}),
        "dense_below": config.get("dense_below", 0),
        "decode": "dense",
        "fingerprint": selector.fingerprint if real and isinstance(selector, Selector) else "",
    }


def _ran(mode: Mode, layers: Sequence[LayerReceipt]) -> dict[str, str]:
    names = sorted({name for x in layers for name in x.backends} - {"dense"})
    receipt = [
        {
            "layer": x.layer,
            "mode": x.mode,
            "backend": x.backend,
            "selected_by": x.selected_by,
            "keys_read_mean": round(x.keys_read_mean, 1),
            "reason": x.reason,
        }
        for x in layers
    ]
    return {
        "backend": "+".join(names) or ("dense" if layers else mode.name),
        "receipt": json.dumps(receipt) if layers else "",
    }
