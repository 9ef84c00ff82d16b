"""`topmass audit`."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cyclopts import Parameter

from topmass.cli._common import MODEL_OPTIONS, ModelOptions, emit, load, run_name, say, write_run
from topmass.errors import ConfigError, DataError
from topmass.results import check_free

if TYPE_CHECKING:
    from topmass import AuditResult

__all__ = ["AuditConfig", "audit", "run_audit"]


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class AuditConfig:
    """What to audit.

    Attributes:
        length: Tokens of each text.
        texts: Number of texts, taken from the evaluation tasks in turn; ignored with `--text`.
        text: Files to audit instead, each cut to `length` tokens.
        budgets: Keys per query: tokens, `5%`, or `mass:0.95<=4096`.
        q_blocks: Queries that share one selection, powers of two.
        kv_blocks: Keys taken together, powers of two.
        share: Heads that share one selection.
        sink: Keys always kept at the start.
        window: Keys always kept up to and including the query's own.
        forwards: `full` compares logits with sparse layers too, `dense` runs the dense model only.
        seed: Seed of the texts.
    """

    length: int = 4096
    texts: int = 4
    text: tuple[Path, ...] = ()
    budgets: tuple[str, ...] = ("64", "256", "1024")
    q_blocks: tuple[int, ...] = (1,)
    kv_blocks: tuple[int, ...] = (1,)
    share: Literal["layer", "kv_head", "q_head"] = "layer"
    sink: int = 0
    window: int = 1
    forwards: Literal["full", "dense"] = "full"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.length < 1 or self.texts < 1:
            raise ConfigError(f"length and texts must be at least 1, got {self.length} and {self.texts}.")


DEFAULTS = AuditConfig()


def audit(
    model: str,
    /,
    settings: AuditConfig = DEFAULTS,
    *,
    options: ModelOptions = MODEL_OPTIONS,
    out: Path | None = None,
    plan: Path | None = None,
    mass: float = 0.95,
) -> None:
    """Measure what an oracle's support keeps, layer by layer, and what it costs.

    Args:
        model: `reference`, a directory, or a hub id.
        out: Run directory; default `runs/audit-MODEL`.
        plan: Also write the budget of every layer to this file (TOML).
        mass: Attention mass that the plan retains: 0.9, 0.95 or 0.99.
    """
    out = out or run_name("audit", model)
    check_free(out, overwrite=options.overwrite)
    _check_plan(plan, mass)
    _units(settings)
    for path in settings.text:
        if not path.is_file():
            raise DataError(f"Cannot read {path}: there is no such file; give a UTF-8 text file.")
    result = run_audit(*load(model, options.dtype, options.device), settings, out=out, overwrite=options.overwrite)
    budgets = result.plan(mass=mass)
    if plan is not None:
        budgets.save(plan)
        say(f"wrote {plan}")
    found = {str(layer): str(budget) for layer, budget in budgets.layers.items()}
    say(f"keys per query that retain {mass:.0%} of the mass: " + ", ".join(f"layer {k} {v}" for k, v in found.items()))
    say(f"next: topmass report {out}")
    if options.json:
        emit({"run": str(out), "mass": mass, "plan": found})


def _check_plan(path: Path | None, mass: float) -> None:
    """Refuse before the audit what would fail after it."""
    from topmass.eval.probe import PLAN_MASSES

    if mass not in PLAN_MASSES:
        raise ConfigError(f"--mass must be one of {', '.join(map(str, PLAN_MASSES))}, got {mass:g}.")
    if path is not None and not path.parent.is_dir():
        raise ConfigError(f"Cannot write the plan {path}: there is no directory {path.parent}; choose another file.")


def run_audit(
    model: Any,
    tokenizer: Any,
    facts: dict[str, Any],
    settings: AuditConfig,
    *,
    out: Path,
    overwrite: bool = False,
    reuse: bool = False,
) -> "AuditResult":
    """Audit a loaded model into a run directory."""
    import topmass
    from topmass.results import load_run

    budgets, granularities = _units(settings)
    texts = _texts(model, tokenizer, settings)
    path = write_run(
        "audit",
        out,
        asdict(settings) | {"text": [str(p) for p in settings.text]},
        facts,
        lambda run, report: topmass.audit(
            model,
            texts,
            budgets=budgets,
            granularities=granularities,
            sink=settings.sink,
            window=settings.window,
            forwards=settings.forwards == "full",
            run=run,
            progress=report,
        ),
        seed=settings.seed,
        overwrite=overwrite,
        reuse=reuse,
    )
    return topmass.AuditResult(records=load_run(path).records)


def _units(settings: AuditConfig) -> tuple[list[Any], list[Any]]:
    """Budgets and granularities."""
    import topmass

    granularities = [
        topmass.Granularity(q_block=q, kv_block=k, share=settings.share)
        for q in settings.q_blocks
        for k in settings.kv_blocks
    ]
    return [topmass.Budget.parse(b) for b in settings.budgets], granularities


def _texts(model: Any, tokenizer: Any, settings: AuditConfig) -> list[list[int]]:
    """Token ids of the texts to audit."""
    if settings.text:
        if (settings.texts, settings.seed) != (DEFAULTS.texts, DEFAULTS.seed):
            say("warning: --texts and --seed have no effect with --text")
        return [_read(path, tokenizer, settings.length) for path in settings.text]
    import topmass
    from topmass.eval.runner import check_lengths

    check_lengths(model, [settings.length])
    tasks = topmass.list_tasks()
    prompts = [
        topmass.make_samples(tasks[i % len(tasks)], tokenizer, length=settings.length, n=1, seed=settings.seed + i)[
            0
        ].prompt
        for i in range(settings.texts)
    ]
    return [tokenizer(prompt)["input_ids"] for prompt in prompts]


def _read(path: Path, tokenizer: Any, length: int) -> list[int]:
    try:
        ids = tokenizer(path.read_text(encoding="utf-8"))["input_ids"]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read {path}: {error}; give a UTF-8 text file.") from error
    if not ids:
        raise DataError(f"{path} is empty; give a text of at least one token.")
    if len(ids) < length:
        say(f"warning: {path} has {len(ids)} tokens, fewer than --length {length}")
    return ids[:length]
