"""`topmass bench`."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cyclopts import Parameter

from topmass.cli._common import emit, print_table, run_name, say, write_run

if TYPE_CHECKING:
    from topmass.report.timings import BenchCase

__all__ = ["KernelsConfig", "kernels"]


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
        "tflops": None if name == "copy" else case.rate(name),
        "tb_per_s": case.rate(name) if name == "copy" else None,
        "speedup": {d: asdict(r) for d, r in dense.items() if r},
        "keys_read_mean": case.value(name, "keys_read_mean"),
        "union_growth": case.value(name, "union_growth"),
        "peak_memory_gib": case.value(name, "peak_memory"),
        "gate_error": case.value(name, "gate_error"),
    }
