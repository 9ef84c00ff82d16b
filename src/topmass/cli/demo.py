"""`topmass demo`."""

import time
from pathlib import Path

from topmass.cli._common import emit, load, say
from topmass.cli.audit import AuditConfig, run_audit
from topmass.cli.eval import EvalConfig, run_eval

__all__ = ["demo"]

# sized for two CPU cores and a few minutes
AUDIT = AuditConfig(length=2048, texts=2, budgets=("16", "64", "256"))
EVAL = EvalConfig(
    lengths=(1024,),
    haystacks=4,
    budgets=("16", "64"),
    q_blocks=(1, 32),
    baselines=("streaming",),
    indexer="reference",
    batch_tokens=10240,
)


def demo(
    *,
    out: Path = Path("runs/demo"),
    device: str = "auto",
    overwrite: bool = False,
    json: bool = False,
    config: Path | None = None,
) -> None:
    """Audit the bundled model, evaluate it with its indexer, and write a report that ends with the gaps: minutes on a laptop.

    Args:
        out: Directory of the two runs and the report; what is complete there is kept.
        device: `cpu`, `cuda`, `mps`; `auto` takes the fastest.
        overwrite: Run again what is complete.
        json: Print paths and answers as JSON.
        config: Recipe (TOML) with a table `[demo]`.
    """
    from topmass.report import build

    start = time.monotonic()
    loaded = load("reference", "auto", device)
    run_audit(*loaded, AUDIT, out=out / "audit", overwrite=True, reuse=not overwrite)
    run_eval(*loaded, EVAL, out=out / "eval", overwrite=True, reuse=not overwrite)
    paths = build(out, out / "report")
    for answer in paths.answers:
        say(answer)
    say(f"{time.monotonic() - start:.0f} s in all; open {paths.html}")
    if json:
        emit({"answers": paths.answers, "html": str(paths.html), "markdown": str(paths.markdown)})
