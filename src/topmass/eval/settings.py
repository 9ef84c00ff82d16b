"""Selectors as the columns of result records, and grids of them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from topmass.core.granularity import Granularity, Share
from topmass.errors import ConfigError
from topmass.selection import DenseSelector, IndexerSelector, OracleSelector, Selector
from topmass.selection.indexer import Indexer

__all__ = ["Infeasible", "columns", "indexer_grid", "label", "oracle_grid"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Infeasible:
    """A cell of a grid whose budget cannot hold sink, window and one key group.

    Attributes:
        settings: What the selector's `config()` would have been.
        reason: Why it cannot be.
    """

    settings: Mapping[str, Any]
    reason: str


def _config(selector: Selector | Infeasible) -> dict[str, Any]:
    return dict(selector.settings if isinstance(selector, Infeasible) else selector.config())


def columns(selector: Selector | Infeasible) -> dict[str, Any]:
    """The setting columns of a record."""
    config = _config(selector)
    if isinstance(selector, IndexerSelector) and not selector.indexer.info.training_tokens:
        config["selector"] = "untrained"
    window = config.get("window", 1)
    if config["selector"] == "streaming":
        config["budget"] = str(config["sink"] + window)
    return {
        "selector": config["selector"],
        "budget": config.get("budget"),
        "q_block": config.get("q_block", 1),
        "kv_block": config.get("kv_block", 1),
        "share": config.get("share", "layer"),
        "pool": config.get("pool", "sum"),
        "reduce": config.get("reduce") if config.get("q_block", 1) > 1 else None,
        "sink": config.get("sink", 0),
        "window": window,
    }


def label(selector: Selector | Infeasible) -> str:
    """A short name such as `oracle b=128 q1 k1 layer`, unique within one evaluation's usual settings.

    Example:
        >>> label(OracleSelector(budget=128, dense_below=1024))
        'oracle b=128 q1 k1 layer d1024'
    """
    c = columns(selector)
    if c["selector"] == "dense":
        return "dense"
    extra = "".join(f" {k}={c[k]}" for k, usual in (("pool", "sum"), ("sink", 0), ("window", 1)) if c[k] != usual)
    if c["reduce"] not in (None, "max"):
        extra += f" {c['reduce']}"
    if below := _config(selector).get("dense_below", 0):
        extra += f" d{below}"
    return f"{c['selector']} b={c['budget']} q{c['q_block']} k{c['kv_block']} {c['share']}{extra}"


def oracle_grid(
    budgets: Iterable[int | str],
    q_blocks: Iterable[int] = (1,),
    kv_blocks: Iterable[int] = (1,),
    *,
    share: Share = "layer",
    **settings: Any,
) -> dict[str, Selector | Infeasible]:
    """Dense, and an oracle for every budget and granularity; cells that cannot be are marked, not dropped.

    Example:
        >>> list(oracle_grid([32, 64], [1, 64]))
        ['dense', 'oracle b=32 q1 k1 layer', 'oracle b=32 q64 k1 layer', 'oracle b=64 q1 k1 layer', 'oracle b=64 q64 k1 layer']
    """
    grid: dict[str, Selector | Infeasible] = {"dense": DenseSelector()}
    q_blocks, kv_blocks = tuple(q_blocks), tuple(kv_blocks)
    for budget in budgets:
        for g in q_blocks:
            for r in kv_blocks:
                granularity = Granularity(q_block=g, kv_block=r, share=share)
                cell: Selector | Infeasible
                try:
                    cell = OracleSelector(budget=budget, granularity=granularity, **settings)
                except ConfigError as error:
                    config = {"selector": "oracle", "budget": str(budget), "q_block": g, "kv_block": r, "share": share}
                    cell = Infeasible(settings={**config, **settings}, reason=str(error))
                grid[label(cell)] = cell
    return grid


def indexer_grid(
    indexer: Indexer, budgets: Iterable[int | str], q_blocks: Iterable[int] = (1,), **settings: Any
) -> dict[str, Selector | Infeasible]:
    """The indexer at every budget and query block, and per query an untrained one of the same shape beside it.

    Args:
        settings: Sink and window.
    """
    info = indexer.info
    untrained = Indexer.create(info.layers, info.fingerprint, granularity=info.granularity, model=info.model)
    pairs = [(indexer, g) for g in dict.fromkeys((1, *q_blocks))] + [(untrained, 1)]
    grid: dict[str, Selector | Infeasible] = {}
    for budget in budgets:
        for scorer, g in pairs:
            granularity = Granularity(q_block=g, kv_block=info.kv_block)
            cell: Selector | Infeasible
            try:
                cell = scorer.selector(budget=budget, granularity=granularity, **settings)
            except ConfigError as error:
                kind = "indexer" if scorer is indexer else "untrained"
                config = {"selector": kind, "budget": str(budget), "q_block": g, "kv_block": info.kv_block}
                cell = Infeasible(settings={**config, **settings}, reason=str(error))
            grid[label(cell)] = cell
    return grid
