"""Requests to a real engine: first token, time per output token, throughput, prefix cache and KV memory, by mode."""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

from topmass.bench.serve_engines import Answers, Driver, Engine, Launch, open_engine
from topmass.bench.timing import rotation
from topmass.core.granularity import Granularity
from topmass.errors import ConfigError
from topmass.results import Run
from topmass.results.schema import SERVE_METRICS

__all__ = ["Load", "Mode", "ServeSetting", "bench_serve", "make_load", "sparse_table"]

Mode = Literal["dense", "sparse", "floor"]
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSetting:
    """What is asked of each engine, and how.

    Attributes:
        modes: The engine as it is, with an indexer, and with attention replaced by a copy of the values.
        drivers: The engine in a process of its own, and the OpenAI-compatible server.
        lengths: Prompt lengths, tokens.
        rates: Requests a second, at random moments (Poisson); 0 sends one after the other.
        requests: Requests of each mode at a length and rate.
        new_tokens: Tokens that each request generates.
        shared: Share of a prompt that all prompts of a case begin with, for the prefix cache.
        interleave: All modes' engines live at once and take turns; else one after the other.
        sparse: The table `topmass` of `--additional-config`.
        q_blocks: Queries that share a selection: a sparse engine for each, called `sparse q32`. None: one engine, as `sparse` says.
        engine: Further arguments of the engine, by their name in Python.
        seed: Seed of prompts and moments.

    Raises:
        ConfigError: A value is out of range.
    """

    modes: tuple[str, ...] = ("dense", "sparse", "floor")
    drivers: tuple[str, ...] = ("offline",)
    lengths: tuple[int, ...] = (1024, 8192)
    rates: tuple[float, ...] = (0.0,)
    requests: int = 8
    new_tokens: int = 16
    shared: float = 0.0
    interleave: bool = True
    sparse: Mapping[str, Any] = field(default_factory=dict)
    q_blocks: tuple[int, ...] = ()
    engine: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("requests", 1), ("new_tokens", 2)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        for name, known in (("modes", get_args(Mode)), ("drivers", get_args(Driver))):
            given = getattr(self, name)
            if not given or set(given) - set(known):
                raise ConfigError(f"{name} are {', '.join(known)}; got {', '.join(given) or 'none'}.")
        if not self.lengths or min(self.lengths) < 1:
            raise ConfigError(f"Lengths must be at least 1, got {list(self.lengths)}.")
        if not self.rates or not all(math.isfinite(r) and r >= 0 for r in self.rates):
            raise ConfigError(f"Rates must be at least 0 requests a second, got {list(self.rates)}.")
        if not 0 <= self.shared < 1:
            raise ConfigError(f"shared must be at least 0 and below 1, got {self.shared}.")
        if "sparse" in self.modes and not self.sparse:
            raise ConfigError("The sparse mode needs an indexer and a budget; give them, or leave the mode out.")
        for block in self.q_blocks:
            Granularity(q_block=block)
        if self.q_blocks and "sparse" not in self.modes:
            raise ConfigError("q_blocks are of sparse engines, and no mode is sparse; leave one of the two out.")
        for name in ("additional_config", "attention_config"):
            if not isinstance(value := self.engine.get(name, {}), Mapping):
                raise ConfigError(f"The engine's {name} must be a JSON object, got {value!r}.")

    @property
    def engines(self) -> dict[str, tuple[str, dict[str, Any]]]:
        """Mode and `topmass` table of every engine, by its name in the records.

        Example:
            >>> setting = ServeSetting(modes=("dense", "sparse"), sparse={"budget": 2048}, q_blocks=(1, 32))
            >>> list(setting.engines), setting.engines["sparse q32"][1]
            (['dense', 'sparse q1', 'sparse q32'], {'budget': 2048, 'granularity': {'q_block': 32}})
        """
        found: dict[str, tuple[str, dict[str, Any]]] = {}
        for mode in self.modes:
            if mode != "sparse":
                found[mode] = mode, {}
            elif not self.q_blocks:
                found[mode] = mode, dict(self.sparse)
            else:
                unit = self.sparse.get("granularity", {})
                found |= {
                    f"{mode} q{block}": (mode, {**self.sparse, "granularity": {**unit, "q_block": block}})
                    for block in self.q_blocks
                }
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Requests of one length and rate, the same for every mode.

    Attributes:
        prompts: Token ids.
        moments: Seconds after the start at which each is sent; none means one after the other.
    """

    prompts: list[list[int]]
    moments: list[float] | None


def make_load(setting: ServeSetting, vocabulary: int, length: int, rate: float, *, text: Sequence[int] = ()) -> Load:
    """Random prompts, or windows of a text, of which a share is common, at random moments.

    Args:
        vocabulary: Random tokens are below it.
        text: Tokens of a text.

    Raises:
        ConfigError: The text is shorter than a prompt.

    Example:
        >>> load = make_load(ServeSetting(modes=("dense",), shared=0.5, requests=3), 100, 8, 2.0)
        >>> [len(p) for p in load.prompts], load.prompts[0][:4] == load.prompts[1][:4], load.moments[0]
        ([8, 8, 8], True, 0.0)
    """
    if text and len(text) < length:
        raise ConfigError(f"The text has {len(text)} tokens, and a prompt {length}; give a longer text.")
    draw = random.Random(f"{setting.seed} {length} {rate}")
    pick = partial(_window, text) if text else partial(_random, vocabulary)
    common = pick(draw, int(setting.shared * length))
    prompts = [[*common, *pick(draw, length - len(common))] for _ in range(setting.requests)]
    if not rate:
        return Load(prompts=prompts, moments=None)
    moments = [0.0]
    while len(moments) < setting.requests:
        moments.append(moments[-1] + draw.expovariate(rate))
    return Load(prompts=prompts, moments=moments)


def _random(vocabulary: int, draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(vocabulary) for _ in range(count)]


def _window(text: Sequence[int], draw: random.Random, count: int) -> list[int]:
    start = draw.randrange(len(text) - count + 1)
    return list(text[start : start + count])


def bench_serve(
    launch: Launch,
    setting: ServeSetting,
    *,
    run: Run | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Ask every engine the same requests; return records of the kind `serve`.

    Times are wall times of the client: the first token's from the moment at which the request is due.

    Args:
        launch: The model, and how engines of it are started.
        run: Keeps the records; what it has is not asked again.
        progress: Called with done, total and what is next.

    Raises:
        ConfigError: vLLM is missing, the text is too short, or an engine did not start.
    """
    cases = [(d, n, float(r)) for d in dict.fromkeys(setting.drivers) for n in dict.fromkeys(setting.lengths) for r in dict.fromkeys(setting.rates)]  # fmt: skip
    cases = [case for case in cases if run is None or not run.done(case)]
    kept: dict[tuple[str, int, float], list[dict[str, Any]]] = {case: [] for case in cases}
    groups = [tuple(setting.engines)]
    if not setting.interleave:
        groups = [(mode,) for mode in groups[0]]
    loads = {case: make_load(setting, launch.vocabulary, *case[1:], text=launch.text) for case in cases}
    total, done = len(cases) * len(groups), 0
    rows: list[dict[str, Any]] = []
    for driver in dict.fromkeys(d for d, _, _ in cases):
        for modes in groups:
            with ExitStack() as stack:
                engines: dict[str, Engine] = {}
                for mode in modes:
                    if progress is not None:
                        progress(done, total, f"starting {driver} {mode}")
                    engines[mode] = stack.enter_context(_open(driver, mode, launch, setting))
                for case in (c for c in cases if c[0] == driver):
                    if progress is not None:
                        progress(done, total, f"{driver}, {case[1]} tokens, {case[2]:g} requests/s")
                    kept[case] += _measure(engines, loads[case], case, launch.vocabulary, setting)
                    done += 1
                    if {row["mode"] for row in kept[case]} == set(setting.engines):
                        rows += kept[case]
                        if run is not None:
                            run.append(kept[case])
    return rows


def _open(driver: str, name: str, launch: Launch, setting: ServeSetting) -> Engine:
    options: dict[str, Any] = {
        "max_model_len": max(setting.lengths) + setting.new_tokens,
        "enable_prefix_caching": setting.shared > 0,
        **setting.engine,
    }
    extra = dict(options.pop("additional_config", {}))
    mode, table = setting.engines[name]
    if mode == "sparse":
        extra["topmass"] = sparse_table(launch.indexer, table)
        options["attention_config"] = {**options.get("attention_config", {}), "backend": "CUSTOM"}
    elif mode == "floor":
        extra["topmass_floor"] = True
    return open_engine(driver, launch, {**options, "additional_config": extra})


def sparse_table(indexer: str, table: Mapping[str, Any]) -> dict[str, Any]:
    """The table `topmass` of `--additional-config`: an engine's, with the indexer if one was given."""
    return {**({"indexer": indexer} if indexer else {}), **table}


def _measure(
    engines: Mapping[str, Engine], load: Load, case: tuple[str, int, float], vocabulary: int, setting: ServeSetting
) -> Iterator[dict[str, Any]]:
    fixed = dict(zip(("driver", "length", "rate"), case, strict=True))
    names = list(engines)
    warm = [(t + 1) % vocabulary for t in load.prompts[0]]
    for engine in engines.values():
        # what is compiled on first use, of this length; ids that no request has
        engine.ask([warm], None, setting.new_tokens)
    if load.moments is None:
        parts: dict[str, list[Answers]] = {mode: [] for mode in names}
        for i, prompt in enumerate(load.prompts):
            for mode in rotation(names, i):
                parts[mode].append(engines[mode].ask([prompt], None, setting.new_tokens))
        found = {mode: Answers.joined(many) for mode, many in parts.items()}
    else:
        found = {mode: engine.ask(load.prompts, load.moments, setting.new_tokens) for mode, engine in engines.items()}
    for mode, answers in found.items():
        here = fixed | {"mode": mode, "status": "ok"}
        for i, one in enumerate(answers.requests):
            yield from (_row(here, metric, value, i) for metric, value in one.items())
        yield from (_row(here, metric, value, -1) for metric, value in answers.totals(case[1]).items())


def _row(fixed: Mapping[str, Any], metric: str, value: float, request: int) -> dict[str, Any]:
    return {**fixed, "request": request, "metric": metric, "value": value, "unit": SERVE_METRICS[metric][0]}
