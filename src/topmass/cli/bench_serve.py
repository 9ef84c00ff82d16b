"""`topmass bench serve`."""

import json as json_module
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cyclopts import Parameter

from topmass.cli._common import emit, print_table, run_name, say, write_run
from topmass.errors import ConfigError

if TYPE_CHECKING:
    from topmass.report.serve import ServeCase

__all__ = ["ServeConfig", "serve"]


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """What is asked, of which engines.

    Attributes:
        lengths: Prompt lengths, tokens.
        rates: Requests a second, at random moments (Poisson); 0 sends one after the other.
        requests: Requests of each mode at a length and rate.
        new_tokens: Tokens that each request generates.
        shared: Share of a prompt that all prompts begin with; above 0 the prefix cache is on.
        text: UTF-8 file that prompts are windows of; default text of the needle task, and random tokens for a shape.
        modes: The engine as it is, with the indexer, and with attention replaced by a copy of the values.
        drivers: The engine alone, and the OpenAI-compatible server.
        indexer: Directory of an indexer, or `reference`; default that of `--serve`, else an untrained one that stands in for it.
        budget: Keys per query: tokens, `5%`, or `mass:0.95<=4096`.
        dense_below: Positions up to this length attend densely.
        q_blocks: Queries that share a selection: a sparse engine for each; default one engine, as `--serve` says, else per query.
        serve: A file that `topmass frontier` wrote, or one with the plugin's settings, in the place of a budget and `--dense-below`.
        dim: Width of an untrained indexer's queries and keys.
        kv_block: Keys that an untrained indexer takes together.
        one_by_one: One mode's engine at a time, where the memory does not hold all of them.
        engine: Further arguments of the engine, as JSON: `{"max_num_batched_tokens": 16384}`.
        seed: Seed of prompts and moments.
    """

    lengths: tuple[int, ...] = (1024, 8192, 32768)
    rates: tuple[float, ...] = (0.0,)
    requests: int = 8
    new_tokens: int = 16
    shared: float = 0.0
    text: Path | None = None
    modes: tuple[Literal["dense", "sparse", "floor"], ...] = ("dense", "sparse", "floor")
    drivers: tuple[Literal["offline", "server"], ...] = ("offline", "server")
    indexer: str | None = None
    budget: str = "2048"
    dense_below: int = 0
    q_blocks: tuple[int, ...] = ()
    serve: Path | None = None
    dim: int = 64
    kv_block: int = 1
    one_by_one: bool = False
    engine: str = "{}"
    seed: int = 0


DEFAULTS = ServeConfig()


def serve(
    model: str,
    /,
    settings: ServeConfig = DEFAULTS,
    *,
    out: Path | None = None,
    overwrite: bool = False,
    json: bool = False,
    config: Path | None = None,
) -> None:
    """Ask vLLM the same requests in each mode: first token, time per token, throughput, prefix cache, KV memory.

    Args:
        model: A shape with random weights (`qwen3.5-9b`, `qwen3.5-0.8b`, `qwen3-8b`, `llama-3.1-8b`, `tiny`), `reference`, or a
            directory.
        out: Run directory; default `runs/serve-MODEL`.
        overwrite: Replace a complete run.
        json: Print medians, p10-p90 and ratios as JSON.
        config: Recipe (TOML) with a table `[bench.serve]`.
    """
    from topmass.bench.serve import bench_serve
    from topmass.bench.serve_engines import check_vllm
    from topmass.bench.serve_models import prepare
    from topmass.report.serve import ServeTable
    from topmass.results import check_free, load_run

    setting = setting_of(settings)
    out = out or run_name("serve", model)
    check_free(out, overwrite=overwrite)
    check_vllm()
    with tempfile.TemporaryDirectory(prefix="topmass-serve-") as folder:
        launch, facts = prepare(
            model,
            setting,
            Path(folder),
            indexer=settings.indexer,
            text=settings.text,
            dim=settings.dim,
            kv_block=settings.kv_block,
            say=say,
        )
        path = write_run(
            "serve",
            out,
            asdict(settings)
            | {
                "serve": str(settings.serve or ""),
                "text": launch.source,
                "stand_in": launch.stand_in,
                "interleave": setting.interleave,
            },
            facts,
            lambda run, report: bench_serve(launch, setting, run=run, progress=report),
            seed=settings.seed,
            overwrite=overwrite,
        )
    cases = ServeTable([load_run(path)]).cases
    for case in cases:
        _show(case)
    say(f"next: topmass report {path}")
    if json:
        emit({"run": str(path), "cells": [cell for case in cases for cell in _cells(case)]})


def setting_of(settings: ServeConfig) -> Any:
    """What `bench_serve` takes.

    Raises:
        ConfigError: A value is out of range.
    """
    from topmass.bench.serve import ServeSetting

    try:
        engine = json_module.loads(settings.engine)
    except ValueError as error:
        raise ConfigError(f"--engine is not JSON: {error}.") from error
    if not isinstance(engine, dict):
        raise ConfigError(f"--engine must be a JSON object of the engine's arguments, got {settings.engine}.")
    _check_alone(settings)
    if settings.serve is not None:
        sparse: dict[str, Any] = {"config": str(settings.serve)}
    else:
        sparse = {"budget": settings.budget, "dense_below": settings.dense_below}
    return ServeSetting(
        modes=settings.modes,
        drivers=settings.drivers,
        lengths=settings.lengths,
        rates=settings.rates,
        requests=settings.requests,
        new_tokens=settings.new_tokens,
        shared=settings.shared,
        interleave=not settings.one_by_one,
        sparse=sparse,
        q_blocks=settings.q_blocks,
        engine=engine,
        seed=settings.seed,
    )


def _check_alone(settings: ServeConfig) -> None:
    """Refuse what would be ignored."""

    def given(*names: str) -> list[str]:
        return [f"--{n.replace('_', '-')}" for n in names if getattr(settings, n) != getattr(DEFAULTS, n)]

    if "sparse" not in settings.modes and (
        found := given("indexer", "budget", "dense_below", "serve", "dim", "kv_block")
    ):
        raise ConfigError(f"{found[0]} is of sparse engines, and no mode is sparse; leave one of the two out.")
    if settings.serve is not None and (found := given("budget", "dense_below")):
        raise ConfigError(f"{found[0]} and --serve exclude each other: the file says it; leave one out.")
    if (settings.indexer or settings.serve) and (found := given("dim", "kv_block")):
        raise ConfigError(
            f"{found[0]} is of an untrained indexer, and another one was given; leave one of the two out."
        )


def _show(case: "ServeCase") -> None:
    from topmass.report.figures import tokens
    from topmass.report.serve import HEADER, line

    pace = f"{case.rate:g} requests/s" if case.rate else "one after the other"
    print_table(f"{case.driver}, {tokens(case.length)} tokens, {pace}", HEADER, [line(case, m) for m in case.modes])


def _cells(case: "ServeCase") -> list[dict[str, Any]]:
    """One entry per mode."""
    totals = ("throughput", "prompt_throughput", "prefix_hits", "kv_usage", "kv_memory")
    found = []
    for mode in case.modes:
        times = {f"{metric}_ms": case.spread(mode, metric) for metric in ("ttft", "tpot", "latency")}
        ratios = {f"dense_{metric}_over_this": case.ratio("dense", mode, metric) for metric in ("ttft", "tpot")}
        found.append(
            {"driver": case.driver, "length": case.length, "rate": case.rate, "mode": mode}
            | {name: asdict(value) if value else None for name, value in {**times, **ratios}.items()}
            | {metric: case.total(mode, metric) for metric in totals}
            | {"of_attainable_saving": case.attained(mode) if mode in case.sparse else None}
        )
    return found
