"""`topmass eval`."""

import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cyclopts import Parameter

from topmass.cli._common import (
    MODEL_OPTIONS,
    ModelOptions,
    check_backend,
    emit,
    load,
    print_table,
    run_name,
    say,
    write_run,
)
from topmass.errors import ConfigError
from topmass.results import check_free

if TYPE_CHECKING:
    from topmass.report.aggregate import EvalTable

__all__ = ["EvalConfig", "evaluate", "run_eval"]

Baseline = Literal["streaming", "random", "pooled", "previous_layer"]


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    """What to evaluate; dense attention always runs on the same samples.

    Attributes:
        tasks: Task names; none means all.
        lengths: Prompt and answer together, in the model's tokens.
        haystacks: Haystacks per task and length.
        questions: Questions per haystack.
        budgets: Keys per query: tokens, `5%`, or `mass:0.95<=4096`.
        q_blocks: Queries that share one selection, powers of two.
        kv_blocks: Keys taken together, powers of two.
        grid: `cross` runs every pair of q_block and kv_block, `axes` varies one while the other is 1.
        share: Heads that share one selection.
        pool: Score of a group from its tokens.
        sink: Keys always kept at the start.
        window: Keys always kept up to and including the query's own.
        dense_below: Queries that see at most this many keys read them all; `auto` takes the crossover that the indexer holds
            for this machine's device.
        backend: Kernel backend of attention and selection; a name never falls back.
        baselines: Selectors that run beside the oracle at the same budgets in tokens.
        indexer: Directory of an indexer, or `reference`; runs at every budget per query and at `q_blocks`, with an untrained
            one beside it, and the report splits what is lost into gaps.
        decode: How generated positions attend.
        haystack: UTF-8 text file that replaces the bundled filler.
        batch_tokens: Prompt tokens computed together.
        seed: Seed of the samples.
    """

    tasks: tuple[str, ...] = ()
    lengths: tuple[int, ...] = (4096,)
    haystacks: int = 20
    questions: int = 1
    budgets: tuple[str, ...] = ("32", "128", "512")
    q_blocks: tuple[int, ...] = (1,)
    kv_blocks: tuple[int, ...] = (1,)
    grid: Literal["cross", "axes"] = "cross"
    share: Literal["layer", "kv_head", "q_head"] = "layer"
    pool: Literal["sum", "max"] = "sum"
    sink: int = 0
    window: int = 1
    dense_below: int | Literal["auto"] = 0
    backend: str = "auto"
    baselines: tuple[Baseline, ...] = ()
    indexer: str | None = None
    decode: Literal["dense", "sparse"] = "dense"
    haystack: Path | None = None
    batch_tokens: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("haystacks", "questions", "batch_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")


DEFAULTS = EvalConfig()


def evaluate(
    model: str,
    /,
    settings: EvalConfig = DEFAULTS,
    *,
    options: ModelOptions = MODEL_OPTIONS,
    out: Path | None = None,
) -> None:
    """Score selectors on long-context tasks, on the same samples as dense attention.

    Args:
        model: `reference`, a directory, or a hub id.
        out: Run directory; default `runs/eval-MODEL`.
    """
    from topmass.eval.tasks import get_task

    selectors(settings)  # complain before loading
    for task in settings.tasks:
        get_task(task)
    check_backend(settings.backend)
    out = out or run_name("eval", model)
    check_free(out, overwrite=options.overwrite)
    table = run_eval(*load(model, options.dtype, options.device), settings, out=out, overwrite=options.overwrite)
    rows = summary(table)
    header = ["length", "configuration", "achieved keys", "score (%)", "dense minus this (points)"]
    print_table("mean over tasks, 95 % intervals", header, [list(map(str, row.values())) for row in map(_shown, rows)])
    gaps = gap_rows(table)
    if gaps:
        header = ["length", "budget", "queries sharing", "gap", "points lost", "remark"]
        print_table("where quality is lost, 95 % intervals", header, [list(_shown_gap(g).values()) for g in gaps])
    say(f"next: topmass report {out}")
    if options.json:
        emit({"run": str(out), "cells": rows, "gaps": gaps})


def run_eval(
    model: Any,
    tokenizer: Any,
    facts: dict[str, Any],
    settings: EvalConfig,
    *,
    out: Path,
    overwrite: bool = False,
    reuse: bool = False,
) -> "EvalTable":
    """Evaluate a loaded model into a run directory."""
    import topmass
    from topmass.report.aggregate import EvalTable
    from topmass.results import load_run

    _check_indexer(settings.indexer, model)
    if settings.dense_below and "streaming" in settings.baselines:
        say("warning: --dense-below has no effect on the streaming baseline")
    if missing := _unlike_oracle(settings):
        say(f"warning: no oracle selects as the indexer does, so its gaps are not measured; {missing}")
    path = write_run(
        "eval",
        out,
        asdict(settings)
        | {
            "haystack": str(settings.haystack) if settings.haystack else None,
            "indexer_digest": _digest(settings.indexer),
        },
        facts,
        lambda run, report: topmass.evaluate(
            model,
            tokenizer,
            tasks=settings.tasks or None,
            lengths=settings.lengths,
            n=settings.haystacks,
            seed=settings.seed,
            questions=settings.questions,
            selectors=selectors(settings),
            decode=settings.decode,
            backend=settings.backend,
            haystack=settings.haystack,
            batch_tokens=settings.batch_tokens,
            run=run,
            progress=report,
        ),
        seed=settings.seed,
        overwrite=overwrite,
        reuse=reuse,
    )
    return EvalTable([load_run(path)])


def selectors(settings: EvalConfig) -> dict[str, Any]:
    """Every configuration that the settings ask for, by label.

    Raises:
        ConfigError: A budget cannot be read, or none can hold sink, window and one key group.
    """
    import topmass
    from topmass.eval.settings import Infeasible, indexer_grid, label, oracle_grid
    from topmass.selection.indexer import named_indexer

    budgets = [str(topmass.Budget.parse(b)) for b in settings.budgets]
    forced = {"sink": settings.sink, "window": settings.window, "dense_below": _dense_below(settings)}
    pairs = [(settings.q_blocks, settings.kv_blocks)]
    if settings.grid == "axes":
        pairs = [(settings.q_blocks, (1,)), ((1,), settings.kv_blocks)]
    found: dict[str, Any] = {}
    for q_blocks, kv_blocks in pairs:
        found |= oracle_grid(budgets, q_blocks, kv_blocks, share=settings.share, pool=settings.pool, **forced)
    oracles = [s for name, s in found.items() if name != "dense"]
    if oracles and all(isinstance(s, Infeasible) for s in oracles):
        raise ConfigError(oracles[0].reason)
    if settings.indexer is not None:
        found |= indexer_grid(named_indexer(settings.indexer), budgets, settings.q_blocks, **forced)
    for kind in settings.baselines:
        made = [_baseline(kind, int(b), settings.seed, forced["dense_below"]) for b in budgets if b.isdigit()]
        found |= {label(s): s for s in made}
    return found


def _dense_below(settings: EvalConfig) -> int:
    from topmass.selection.crossover import crossover_here
    from topmass.selection.indexer import named_indexer

    if settings.dense_below != "auto":
        return settings.dense_below
    if settings.indexer is None:
        raise ConfigError("--dense-below auto takes the crossover that an indexer holds: give --indexer, or a number.")
    return crossover_here(named_indexer(settings.indexer).info.crossover)


def _check_indexer(name: str | None, model: Any) -> None:
    """Refuse an indexer of another model before dense attention and the oracle have run."""
    from topmass.integrations.transformers.families import find_layers
    from topmass.integrations.transformers.index_features import check_indexer
    from topmass.selection.indexer import named_indexer

    if name is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a fine-tune is warned of when the indexer runs
            check_indexer(named_indexer(name), *find_layers(model))


def _unlike_oracle(settings: EvalConfig) -> str:
    """What to change so that an oracle selects per query as the indexer does; empty if one does, or there is no indexer."""
    from topmass.eval.settings import columns
    from topmass.selection.indexer import named_indexer

    if settings.indexer is None:
        return ""
    group = named_indexer(settings.indexer).info.kv_block
    wanted = {"selector": "oracle", "q_block": 1, "kv_block": group, "share": "layer", "pool": "sum"}
    if any(wanted.items() <= columns(s).items() for s in selectors(settings).values()):
        return ""
    given = {
        "add 1 to --q-blocks": 1 in settings.q_blocks,
        f"add {group} to --kv-blocks": group in settings.kv_blocks,
        "use --share layer": settings.share == "layer",
        "use --pool sum": settings.pool == "sum",
    }
    return ", ".join(remedy for remedy, done in given.items() if not done)


def _digest(name: str | None) -> str | None:
    from topmass.selection.indexer import named_indexer

    return None if name is None else named_indexer(name).digest


def _baseline(kind: Baseline, budget: int, seed: int, dense_below: int) -> Any:
    import topmass
    from topmass.eval.settings import Infeasible

    try:
        if kind == "streaming":
            sink = min(4, budget // 2)
            return topmass.StreamingSelector(sink=sink, window=budget - sink)
        if kind == "random":
            return topmass.RandomSelector(budget=budget, seed=seed, dense_below=dense_below)
        made = {"pooled": topmass.PooledSelector, "previous_layer": topmass.PreviousLayerSelector}[kind]
        return made(budget=budget, dense_below=dense_below)
    except ConfigError as error:
        kv_block = 16 if kind == "pooled" else 1
        return Infeasible(settings={"selector": kind, "budget": str(budget), "kv_block": kv_block}, reason=str(error))


def summary(table: "EvalTable") -> list[dict[str, Any]]:
    """One entry per length and configuration, mean over tasks."""
    cells = [table.cell(n, s) for n in table.lengths for s in table.settings]
    return [
        {
            "length": c.length,
            "setting": asdict(c.setting),
            "status": "infeasible" if c.infeasible else "ok",
            "keys_read_mean": c.keys,
            "score": asdict(c.score) if c.score else None,
            "loss": asdict(c.loss) if c.loss else None,
        }
        for c in cells
        if c is not None
    ]


def gap_rows(table: "EvalTable") -> list[dict[str, Any]]:
    """One entry per length, indexer setting and gap, and for all lengths together if there are several."""
    from topmass.report.gaps import find_gaps

    pooled = [table.compared] if len(table.compared) > 1 else []
    return [
        {
            "lengths": lengths,
            "gap": g.name,
            "setting": asdict(g.served),
            "points": asdict(g.interval) if g.interval else None,
            "remark": g.reason if g.interval else f"not measured: {g.reason}",
        }
        for lengths in [*([n] for n in table.compared), *pooled]
        for g in find_gaps(table, lengths)
    ]


def _shown_gap(entry: dict[str, Any]) -> dict[str, str]:
    s = entry["setting"]
    return {
        "length": " + ".join(map(str, entry["lengths"])),
        "budget": s["budget"],
        "queries": str(s["q_block"]),
        "gap": entry["gap"],
        "points": _interval(entry["points"]),
        "remark": entry["remark"],
    }


def _shown(entry: dict[str, Any]) -> dict[str, str]:
    s = entry["setting"]
    blocks = "" if s["selector"] == "dense" else f" b={s['budget']} q{s['q_block']} k{s['kv_block']} {s['share']}"
    # as topmass.eval.settings.label, by which the other commands call it
    blocks += f" {s['reduce']}" if s["reduce"] not in (None, "max") else ""
    blocks += f" d{s['dense_below']}" if s["dense_below"] else ""
    feasible = entry["status"] == "ok"
    return {
        "length": str(entry["length"]),
        "configuration": s["selector"] + blocks,
        "keys": f"{entry['keys_read_mean']:,.0f}" if feasible else "-",
        "score": _interval(entry["score"]) if feasible else "infeasible",
        "loss": _interval(entry["loss"]),
    }


def _interval(interval: dict[str, float] | None) -> str:
    if interval is None:
        return ""
    return "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * interval[name] for name in ("point", "low", "high")))
