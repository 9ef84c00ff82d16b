"""What the gaps are measured between: selectors by the names that the tables have for them."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from common import Shares, untrained

import topmass
from topmass.core.granularity import Granularity
from topmass.core.plan import Plan
from topmass.errors import ConfigError
from topmass.eval.settings import Infeasible

LENGTHS = (4096, 8192, 16384)
# twice what the indexer was trained at; reported beside the others, not among them
LONG = 32768
SHARED = 32
# share of the context that a budget may have
LARGEST = Fraction(1, 16)
FAR_ROLES = ("streaming", "random", "untrained", "pooled", "previous layer")


def possible(make: Callable[[], Any], name: str, budget: Any) -> Any:
    """A selector, or the mark that its budget is too small."""
    try:
        return make()
    except ConfigError as error:
        return Infeasible(settings={"selector": name, "budget": str(budget)}, reason=str(error))


def roles(indexer: topmass.Indexer, shares: Shares, length: int) -> dict[str, Any]:
    """Everything that is compared, by what it is called in the tables."""
    layers = sorted(indexer.info.layers)
    budget, tokens = shares.budget(length, layers), shares.tokens(length)
    block = Granularity(q_block=SHARED, kv_block=indexer.info.kv_block)
    # a block keeps room for its own queries and reads them half on average: with this much more it reads as many keys
    wider = shares.budget(length, layers, extra=SHARED // 2)
    makers: dict[str, tuple[Any, Callable[[], Any]]] = {
        "dense": (None, topmass.DenseSelector),
        "indexer": (budget, lambda: indexer.selector(budget=budget)),
        "oracle": (budget, lambda: topmass.OracleSelector(budget=budget)),
        "indexer shared": (wider, lambda: indexer.selector(budget=wider, granularity=block)),
        "streaming": (tokens, lambda: topmass.StreamingSelector(sink=4, window=tokens - 4)),
        "random": (budget, lambda: topmass.RandomSelector(budget=budget)),
        "untrained": (budget, lambda: untrained(indexer).selector(budget=budget)),
        "pooled": (budget, lambda: topmass.PooledSelector(budget=budget)),
        "previous layer": (tokens, lambda: topmass.PreviousLayerSelector(budget=tokens)),
    }
    return {name: possible(make, name, nominal) for name, (nominal, make) in makers.items()}


def candidates(indexer: topmass.Indexer, specs: Sequence[str], length: int) -> dict[str, Any]:
    """Dense, the indexer at every candidate budget, and what has to fail at each."""
    found: dict[str, Any] = {"dense": topmass.DenseSelector()}
    for spec in specs:
        all_roles = roles(indexer, Shares.parse(spec), length)
        found |= {f"{name} {spec}": all_roles[name] for name in ("indexer", "streaming", "random", "untrained")}
    return found


def one_layer(indexer: topmass.Indexer, shares: Shares, length: int) -> dict[str, Any]:
    """Dense, and indexer and oracle in one full-attention layer while the others stay dense."""
    layers = sorted(indexer.info.layers)
    whole = shares.budget(length, layers)
    found: dict[str, Any] = {"dense": topmass.DenseSelector()}
    for layer in layers:
        own = whole.budget(layer) if isinstance(whole, Plan) else whole
        plan = Plan(layers={**dict.fromkeys(layers), layer: own})
        found[f"indexer layer {layer}"] = indexer.selector(budget=plan)
        found[f"oracle layer {layer}"] = topmass.OracleSelector(budget=plan)
    return found
