"""`topmass bench`."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cyclopts import Parameter

from topmass.cli._common import DType, check_backend, emit, load, print_table, run_name, say, write_run
from topmass.errors import ConfigError
from topmass.results import check_free

if TYPE_CHECKING:
    from topmass.report.frontier import Frontier
    from topmass.report.timings import BenchCase
    from topmass.report.ttft import TtftCase

__all__ = ["KernelsConfig", "TtftConfig", "kernels", "ttft"]

# parameters of the largest model that is timed on a CPU, to try the command
SMALL = 50_000_000


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class KernelsConfig:
    """What to time; the dense kernels of the device always run in the same rounds.

    Attributes:
        shape: Heads of a known model, such as `qwen3.5-9b`, or `16/4x256`.
        lengths: Prompt lengths, tokens.
        what: The sparse layer by stage, the exact oracle, the indexer's loss with its gradient.
        budget: Keys per query: tokens or `5%`.
        q_block: Queries that share one selection; 1 selects per query.
        kv_block: Keys taken together.
        growth: With fewer than 32 queries sharing, union growth U/K of the inputs, each timed apart.
        dim: Width of the indexer's queries and keys.
        backend: Kernels to time; default `triton` on a GPU, `reference` on a CPU.
        rounds: Times that everything is timed.
        seed: Seed of the inputs.
    """

    shape: str = "qwen3.5-9b"
    lengths: tuple[int, ...] = (8192, 32768, 131072)
    what: tuple[Literal["layer", "oracle", "kl"], ...] = ("layer",)
    budget: str = "2048"
    q_block: int = 32
    kv_block: int = 1
    growth: tuple[float, ...] = ()
    dim: int = 128
    backend: str | None = None
    rounds: int = 7
    seed: int = 0


DEFAULTS = KernelsConfig()


def kernels(
    settings: KernelsConfig = DEFAULTS,
    *,
    out: Path | None = None,
    device: Literal["cuda", "cpu"] = "cuda",
    overwrite: bool = False,
    json: bool = False,
    config: Path | None = None,
) -> None:
    """Time one attention layer: dense kernels and ours, in interleaved rounds, once the results are checked.

    Args:
        out: Run directory; default `runs/bench-SHAPE`.
        device: `cuda`; `cpu` times plain PyTorch, to try the command.
        overwrite: Replace a complete run.
        json: Print medians, p10-p90 and ratios as JSON.
        config: Recipe (TOML) with a table `[bench.kernels]`.
    """
    from topmass.bench.kernels import Setting, bench_kernels
    from topmass.report.timings import BenchTable
    from topmass.results import load_run

    given = asdict(settings)
    which = {name: given.pop(name) for name in ("lengths", "what", "growth")}
    setting = Setting(**given, device=device)
    if not setting.on_gpu:
        say("warning: on a CPU plain PyTorch is timed, which says nothing of any kernel")
    path = write_run(
        "bench",
        out or run_name("bench", setting.layer.name),
        asdict(settings) | {"backend": setting.kernels, "device": device},
        {"model": setting.layer.name, "device": _device(device)},
        lambda run, report: bench_kernels(
            setting, lengths=which["lengths"], what=which["what"], growths=which["growth"], run=run, progress=report
        ),
        seed=settings.seed,
        overwrite=overwrite,
    )
    cases = BenchTable([load_run(path)]).cases
    for case in cases:
        _show(case)
    say(f"next: topmass report {path}")
    if json:
        emit({"run": str(path), "cells": [cell for case in cases for cell in _cells(case)]})


def _device(device: str) -> str:
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def _show(case: "BenchCase") -> None:
    from topmass.report.bench import header, line
    from topmass.report.figures import tokens

    title = f"{case.shape} ({case.heads}), {tokens(case.length)} tokens, {case.config}"
    print_table(title, header(case), [line(case, name) for name in case.names()])


def _cells(case: "BenchCase") -> list[dict[str, Any]]:
    """One entry per timed thing."""
    return [_cell(case, name) for name in case.names()]


def _cell(case: "BenchCase", name: str) -> dict[str, Any]:
    time = case.time(name)
    dense = {d: case.ratio(d, name) for d in case.names("dense")}
    return {
        "shape": case.shape,
        "length": case.length,
        "what": case.what,
        "config": case.config,
        "name": name,
        "role": case.role(name),
        "status": case.reason(name) or "ok",
        "ms": asdict(time) if time else None,
        "tflops": case.rate(name),
        "tb_per_s": case.rate(name, "bytes"),
        "speedup": {d: asdict(r) for d, r in dense.items() if r},
        "keys_read_mean": case.value(name, "keys_read_mean"),
        "union_growth": case.value(name, "union_growth"),
        "peak_memory_gib": case.value(name, "peak_memory"),
        "gate_error": case.value(name, "gate_error"),
    }


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class TtftConfig:
    """What to time; dense kernels and the floor run in the same rounds.

    Attributes:
        lengths: Prompt lengths, tokens.
        batch: Prompts computed together.
        selectors: What chooses keys; `oracle` is a diagnostic, dearer than dense attention.
        budgets: Keys per query: tokens, `5%`, or `mass:0.95<=4096`.
        q_blocks: Queries that share one selection; 1 selects per query.
        kv_blocks: Keys taken together; default the indexer's own, or 1.
        reduces: Scores of queries that share; default what the indexer says.
        indexer: Directories of indexers, or `reference`; default an untrained one that stands in for it.
        dense: Dense kernels to time; default the model as it is (`stock`) and all that the device has.
        dense_below: Positions up to this length attend densely.
        chunk: Tokens of a prompt computed in one forward; 0 for all of them.
        new_tokens: Tokens generated after each prompt, for the time per output token.
        backend: Sparse kernels; a name never falls back.
        dim: Width of an untrained indexer's queries and keys.
        rounds: Times that everything is timed.
        seed: Seed of prompts and random weights.
    """

    lengths: tuple[int, ...] = (8192, 32768, 131072)
    batch: tuple[int, ...] = (1,)
    selectors: tuple[Literal["indexer", "streaming", "pooled", "random", "oracle"], ...] = ("indexer",)
    budgets: tuple[str, ...] = ("2048",)
    q_blocks: tuple[int, ...] = (32,)
    kv_blocks: tuple[int, ...] = ()
    reduces: tuple[Literal["mean", "max", "max_prob"], ...] = ()
    indexer: tuple[str, ...] = ()
    dense: tuple[Literal["stock", "fa2", "cudnn", "fa3", "sdpa"], ...] | None = None
    dense_below: int = 0
    chunk: int = 0
    new_tokens: int = 8
    backend: str = "auto"
    dim: int = 128
    rounds: int = 5
    seed: int = 0


TTFT_DEFAULTS = TtftConfig()


def ttft(
    model: str,
    /,
    settings: TtftConfig = TTFT_DEFAULTS,
    *,
    out: Path | None = None,
    device: Literal["cuda", "cpu"] = "cuda",
    dtype: DType = "auto",
    overwrite: bool = False,
    json: bool = False,
    config: Path | None = None,
) -> None:
    """Time the first token of a whole model: dense kernels, selectors and the floor, in interleaved rounds.

    A time runs from the prompt's ids on the device to the last token's logits on the host.

    Args:
        model: A shape with random weights (`qwen3.5-9b`, `qwen3.5-0.8b`, `qwen3-8b`, `llama-3.1-8b`, `tiny`), `reference`, a
            directory, or a hub id.
        out: Run directory; default `runs/ttft-MODEL`.
        device: `cuda`; `cpu` takes small models only, to try the command.
        dtype: Type of the weights.
        overwrite: Replace a complete run.
        json: Print medians, p10-p90, ratios and receipts as JSON.
        config: Recipe (TOML) with a table `[bench.ttft]`.
    """
    from topmass.bench import ttft as bench
    from topmass.bench.models import is_shape
    from topmass.report.frontier import find_frontier
    from topmass.results import load_run
    from topmass.selection.indexer import named_indexer

    given = asdict(settings)
    which = {name: given.pop(name) for name in ("lengths", "batch", "indexer", "seed")}
    # before anything is loaded
    stress = is_shape(model)
    setting = bench.Setting(**given, random_weights=stress)
    check_backend(settings.backend)
    out = out or run_name("ttft", model)
    check_free(out, overwrite=overwrite)
    indexers = {name: named_indexer(name) for name in dict.fromkeys(which["indexer"])}
    loaded, prompts, facts = _model(model, dtype, device, which["seed"])
    if stress:
        say("random weights: stress rows, which say nothing of quality")
    path = write_run(
        "ttft",
        out,
        asdict(settings)
        | {
            "weights": "random" if stress else "checkpoint",
            "linear_attention": bench.describe_linear(loaded),
            "indexers": {indexer.digest: name for name, indexer in indexers.items()},
        },
        facts,
        lambda run, report: bench.bench_ttft(
            loaded,
            setting,
            lengths=which["lengths"],
            batches=which["batch"],
            prompts=prompts,
            indexers=list(indexers.values()),
            run=run,
            progress=report,
        ),
        seed=which["seed"],
        overwrite=overwrite,
    )
    frontier = find_frontier([load_run(path)])
    for case in frontier.table.cases:
        _show_ttft(model, case)
    found = _crossovers(frontier)
    for cell in found:
        say(f"crossover of {cell['config']}: {_crossover_words(cell)}")
    say(f"next: topmass frontier {path} EVALUATION...")
    if json:
        cells = [cell for case in frontier.table.cases for cell in _ttft_cells(case)]
        emit({"run": str(path), "stress": stress, "cells": cells, "crossovers": found})


def _model(name: str, dtype: DType, device: str, seed: int) -> tuple[Any, Any, dict[str, Any]]:
    """The model, its prompts, and what the manifest says of it."""
    import torch

    from topmass.bench.models import TINY, build_model, is_shape
    from topmass.bench.ttft import random_prompts, text_prompts
    from topmass.integrations.transformers.load import describe_device

    shape = is_shape(name)
    hint = f"try the command with `topmass bench ttft {TINY} --device cpu`."
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"bench ttft found no CUDA GPU: run it where there is one, or {hint}")
    if device == "cpu" and shape and name != TINY:
        raise ConfigError(f"{name} is too large to be timed on a CPU: run it on a GPU, or {hint}")
    if device == "cpu":
        say("warning: on a CPU plain PyTorch is timed, which says nothing of any kernel")
    if shape:
        say(f"building {name}")
        usual = "bfloat16" if device == "cuda" else "float32"
        built = build_model(name, device=device, dtype=getattr(torch, usual if dtype == "auto" else dtype), seed=seed)
        facts = {"model": name, "weights_hash": None, "device": describe_device(built)}
        return built, random_prompts(built, seed), facts
    loaded, tokenizer, facts = load(name, dtype, device)
    if device == "cpu" and sum(p.numel() for p in loaded.parameters()) > SMALL:
        raise ConfigError(f"{name} is too large to be timed on a CPU: run it on a GPU, or {hint}")
    return loaded, text_prompts(loaded, tokenizer, seed), facts


def _show_ttft(model: str, case: "TtftCase") -> None:
    from topmass.report.figures import tokens
    from topmass.report.ttft_text import BRIEF, brief_line

    title = f"{model}, {tokens(case.length)} tokens, batch {case.batch}"
    print_table(title, BRIEF, [brief_line(case, name) for name in case.names()])


def _crossovers(frontier: "Frontier") -> list[dict[str, Any]]:
    """One entry per sparse configuration."""
    found = {}
    for case in frontier.table.line(frontier.batch, frontier.chunk):
        for name in case.names("sparse"):
            if case.times(name):
                cross = frontier.table.crossover(case.first(name)["fingerprint"], frontier.batch, frontier.chunk)
                found[name] = {"config": name, **asdict(cross)}
    return list(found.values())


def _crossover_words(cell: dict[str, Any]) -> str:
    if cell["wins"] is None:
        return "none; in nine rounds of ten it was not faster than dense attention at the longest length timed"
    if cell["dense_below"] is None:
        return "faster than dense attention at every length timed; shorter ones were not"
    return f"dense_below={cell['dense_below']}; faster than dense attention from {cell['wins']} tokens on"


def _ttft_cells(case: "TtftCase") -> list[dict[str, Any]]:
    """One entry per way to attend."""
    return [_ttft_cell(case, name) for name in case.names()]


def _ttft_cell(case: "TtftCase", name: str) -> dict[str, Any]:
    from json import loads

    first = case.first(name)
    spreads = {
        "ttft_ms": case.time(name),
        "layer_ms": case.time(name, "layer"),
        "ms_per_token": case.time(name, "tpot"),
        "attention_share": case.share(name),
        "of_attainable_saving": case.attained(name) if first["role"] == "sparse" else None,
    }
    ratios = {d: case.ratio(d, name) for d in case.names("dense")}
    once = ("keys_read_mean", "peak_memory", "index_memory", "kv_memory", "gate_error", "gate_plain_error")
    return {
        "length": case.length,
        "batch": case.batch,
        "chunk": case.chunk,
        "name": name,
        "role": first["role"],
        "status": case.reason(name) or "ok",
        "fingerprint": first["fingerprint"],
        "backend": first["backend"],
        "setting": asdict(case.setting(name)),
        **{key: asdict(s) if s else None for key, s in spreads.items()},
        "speedup": {d: asdict(r) for d, r in ratios.items() if r},
        **{metric: case.value(name, metric) for metric in once},
        "receipt": loads(first["receipt"]) if first["receipt"] else [],
    }
