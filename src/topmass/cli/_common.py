"""What the commands share: words for people on stderr, JSON on stdout, runs with progress."""

import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cyclopts import Parameter

from topmass.cli._progress import Callback, progress
from topmass.errors import RunError
from topmass.results import Run, load_run, make_manifest, same_run

__all__ = [
    "MODEL_OPTIONS",
    "DType",
    "ModelOptions",
    "check_backend",
    "check_directory",
    "emit",
    "load",
    "print_table",
    "run_name",
    "say",
    "write_run",
]

DType = Literal["auto", "float32", "bfloat16", "float16", "float64"]
LOG_WIDTH = 160


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """What the commands that load a model have in common.

    Attributes:
        dtype: Type of the model's weights.
        device: `cpu`, `cuda`, `mps`; `auto` takes the fastest.
        overwrite: Replace a complete run.
        json: Print what was found as JSON.
        config: Recipe (TOML) with a table that has the name of the command.
    """

    dtype: DType = "auto"
    device: str = "auto"
    overwrite: bool = False
    json: bool = False
    config: Path | None = None


MODEL_OPTIONS = ModelOptions()


def say(text: str) -> None:
    """Tell people something."""
    print(text, file=sys.stderr, flush=True)


def emit(value: Any) -> None:
    """Print JSON for programs; what is not a number is null."""
    print(json.dumps(_finite(value), ensure_ascii=False, indent=2))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """Print a table for people."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*header, box=None, header_style="bold")
    for row in rows:
        table.add_row(*row)
    # a log has no width to wrap at; COLUMNS still counts
    width = None if sys.stderr.isatty() or "COLUMNS" in os.environ else LOG_WIDTH
    console = Console(stderr=True, width=width, highlight=False)
    console.print(title, style="italic", markup=False, soft_wrap=True)
    console.print(table)


def run_name(kind: str, model: str) -> Path:
    """Where a run goes when `--out` does not say."""
    name = Path(model).name or model
    return Path("runs") / f"{kind}-{name.replace('/', '-')}"


def check_backend(name: str) -> None:
    """Refuse a kernel backend that no sparse attention has, before anything is loaded.

    Raises:
        BackendUnavailableError: Names those that there are.
    """
    from topmass.ops import _dispatch, sparse_prefill

    assert sparse_prefill  # its import registers the backends
    if name != "auto":
        _dispatch.known("sparse_prefill", name)


def check_directory(path: Path, option: str) -> None:
    """Refuse a directory that cannot be written or made, before anything is done for it.

    Args:
        path: The directory.
        option: What names it on the command line.

    Raises:
        RunError: Says what is in the way.
    """
    path = path.absolute()
    there = next(p for p in (path, *path.parents) if p.exists())
    reason = "no directory" if not there.is_dir() else "" if os.access(there, os.W_OK | os.X_OK) else "write-protected"
    if reason:
        raise RunError(f"Cannot write to {path}: {there} is {reason}. Choose another {option}.")


def load(model: str, dtype: DType, device: str) -> tuple[Any, Any, dict[str, Any]]:
    """Load a model and its tokenizer; also what a manifest says of them."""
    from transformers.utils import logging

    from topmass.integrations.transformers.load import describe_device, load_model, weights_hash

    # one bar at a time, and that one ours
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    say(f"loading {model}")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        loaded, tokenizer = load_model(model, dtype=None if dtype == "auto" else dtype, device=device)
    for line in dict.fromkeys(" ".join(str(w.message).split()) for w in told):
        say(f"warning: {line}")
    facts = {"model": model, "weights_hash": weights_hash(loaded), "device": describe_device(loaded)}
    return loaded, tokenizer, facts


def write_run(
    kind: str,
    out: Path,
    config: Mapping[str, Any],
    facts: Mapping[str, Any],
    work: Callable[[Run, Callback], object],
    *,
    seed: int,
    overwrite: bool,
    reuse: bool = False,
) -> Path:
    """Do the work of a run in its directory, resuming what is there.

    Args:
        kind: Kind of the run.
        out: The directory.
        config: The resolved configuration.
        facts: Model, weights and device.
        work: Appends rows to the run.
        seed: Seed of the samples.
        overwrite: Replace a complete run.
        reuse: Keep a complete run of the same configuration instead.
    """
    manifest = make_manifest(kind, config, seeds={"samples": seed}, **facts)
    if reuse and same_run(out, manifest):
        say(f"{out} is complete already")
        return out
    with Run.open(out, manifest, overwrite=overwrite) as run, progress(kind) as report:
        if run.resumed:
            say(f"resuming {out}: {run.resumed} rows are there")
        work(run, report)
        run.finish()
    say(f"wrote {out} ({len(load_run(out).records)} rows)")
    return out
