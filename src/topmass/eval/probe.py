"""What an audit measures while the layers run dense: every setting's support on every query, a chunk of queries at a time."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from topmass.core.granularity import Granularity
from topmass.core.support import Support
from topmass.eval.settings import columns
from topmass.integrations.transformers._session import LayerCall
from topmass.ops._logits import causal_logits, rows_that_fit, softmax_and_normaliser, weighted_values
from topmass.ops.sparse_prefill.reference import expand_to_heads
from topmass.selection import AttentionInputs, OracleSelector, Selector
from topmass.selection.base import RankedSelector
from topmass.selection.oracle import check_mass

__all__ = ["PLAN_MASSES", "Probe", "records_of"]

TILES = (2, 4, 8, 16, 32, 64)
TILE = TILES[-1]
# per text: tiles of 64 queries on which the costly diagnostics are computed
SAMPLED_TILES = 16
PLAN_MASSES = (0.9, 0.95, 0.99)


def records_of(values: Mapping[str, tuple[float | None, str]], selector: Selector, layer: int) -> list[dict[str, Any]]:
    """One record per metric, of a setting and a layer; -1 is all of them."""
    setting = columns(selector)
    return [{**setting, "layer": layer, "metric": m, "value": v, "unit": u} for m, (v, u) in values.items()]


@dataclass(slots=True)
class _Tally:
    """Sums over the queries of one text, for one layer and setting."""

    retained: list[Tensor] = field(default_factory=list)
    sums: dict[str, Any] = field(default_factory=lambda: defaultdict(float))
    counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def add(self, metric: str, values: Tensor) -> None:
        """Add one value per query or tile."""
        self.sums[metric] = self.sums[metric] + values.double().sum()
        self.counts[metric] += values.numel()

    def means(self) -> Iterator[tuple[str, float]]:
        """Mean of every metric."""
        for metric, total in self.sums.items():
            yield metric, float(total) / self.counts[metric]


class Probe:
    """Runs the layers dense and measures every setting on the way, a chunk of queries at a time."""

    def __init__(self, settings: Mapping[str, Selector], q_len: int, base: OracleSelector) -> None:
        self.settings, self.base = settings, base
        self.tallies: dict[tuple[int, str], _Tally] = defaultdict(_Tally)
        self.curves: dict[int, list[Tensor]] = defaultdict(list)
        self.sampled: dict[int, int] = defaultdict(int)
        tiles = range(0, q_len, TILE)
        self.stride = max(1, len(tiles) // SAMPLED_TILES)
        # no query block may be split between two calls of its selector
        self.multiple = max(TILE, *(columns(s)["q_block"] for s in settings.values()))
        self._carry: dict[tuple[str, int], dict[str, Any]] = defaultdict(dict)

    def begin_forward(self) -> None:
        """Nothing is carried between forwards."""
        self._carry.clear()

    def __call__(self, call: LayerCall) -> Float[Tensor, "batch q_len q_heads v_dim"]:
        """Dense attention of one layer, measured."""
        stop = call.k.shape[1]
        # three arrays of this size are alive at a time
        step = rows_that_fit(call.q, stop, heads=3 * call.q.shape[2], multiple=self.multiple)
        return torch.cat([self._rows(call, lo, min(lo + step, stop)) for lo in range(call.q_start, stop, step)], 1)

    def _rows(self, call: LayerCall, lo: int, hi: int) -> Tensor:
        q, k, v = call.q[:, lo - call.q_start : hi - call.q_start], call.k[:, :hi], call.v[:, :hi]
        logits = causal_logits(q, k, scale=call.scale, q_start=lo, softcap=call.softcap)
        p, _ = softmax_and_normaliser(logits, call.sinks)
        check_mass(p, layer=call.layer, has_sinks=call.sinks is not None)
        out = weighted_values(p, v)
        for name, selector in self.settings.items():
            inputs = AttentionInputs(
                q=q, k=k, layer=call.layer, scale=call.scale, q_start=lo, softcap=call.softcap, sinks=call.sinks, p=p,
                carry=self._carry[name, lo],
            )  # fmt: skip
            if selector.rule(call.layer) is not None:
                self._measure(self.tallies[call.layer, name], selector, inputs, p, v, out)
        for tile in self._tiles(lo, hi):
            self.curves[call.layer].append(_retention_curve(p[:, :, tile], lo + tile.start, self.base))
            self.sampled[call.layer] += tile.stop - tile.start
        return out.to(call.q.dtype)

    def _tiles(self, lo: int, hi: int) -> list[slice]:
        starts = [s for s in range(lo, hi, TILE) if (s // TILE) % self.stride == self.stride - 1]
        return [slice(s - lo, min(s + TILE, hi) - lo) for s in starts]

    def _measure(
        self,
        tally: _Tally,
        selector: Selector,
        inputs: AttentionInputs,
        p: Float[Tensor, "1 q_heads q_len kv_len"],
        v: Float[Tensor, "1 kv_len kv_heads v_dim"],
        out: Float[Tensor, "1 q_len q_heads v_dim"],
    ) -> None:
        support = selector.select(inputs)
        mask = expand_to_heads(support.mask(p.shape[-1]), p.shape[1])
        kept = p.masked_fill(~mask, 0.0)
        retained = kept.sum(-1)
        if inputs.sinks is not None:
            # a learned sink is always kept
            retained = retained + (1 - p.sum(-1))
        sparse = weighted_values(kept, v) / retained.transpose(1, 2)[..., None]
        error = (sparse - out).flatten(2).norm(dim=-1) / out.flatten(2).norm(dim=-1).clamp_min(1e-30)
        tally.retained.append(retained.mean(1).flatten())
        tally.add("kl_head_mean", -retained.clamp_min(torch.finfo(retained.dtype).tiny).log())
        tally.add("output_rel_error", error)
        tally.add("keys_read_mean", support.keys_read())
        for tile in self._tiles(inputs.start, inputs.start + p.shape[2]):
            _tile_diagnostics(tally, selector, support, mask[:, :, tile], p[:, :, tile], inputs, tile)

    def records(self) -> list[dict[str, Any]]:
        """Rows of every layer and setting, and the budgets of a plan."""
        rows = []
        for (layer, name), tally in self.tallies.items():
            retained = torch.cat(tally.retained).double()
            values: dict[str, tuple[float | None, str]] = {
                "retained_mass_mean": (retained.mean().item(), "fraction"),
                "retained_mass_p5": (_quantile(retained, 0.05), "fraction"),
                "retained_mass_p50": (_quantile(retained, 0.5), "fraction"),
            }
            values |= {metric: (mean, _unit(metric)) for metric, mean in tally.means()}
            rows += records_of(values, self.settings[name], layer)
        for layer, curves in self.curves.items():
            rows += [
                {**row, "budget": None}
                for row in records_of(_plan_values(curves, self.sampled[layer]), self.base, layer)
            ]
        return rows


def _tile_diagnostics(
    tally: _Tally,
    selector: Selector,
    support: Support,
    mask: Bool[Tensor, "1 heads tile kv_len"],
    p: Float[Tensor, "1 q_heads tile kv_len"],
    inputs: AttentionInputs,
    tile: slice,
) -> None:
    sparse = support.sparse_rows()[tile]
    if not bool(sparse.all()):
        return
    if isinstance(selector, RankedSelector) and selector.granularity.share != "q_head":
        _dropped(tally, selector, mask, p, inputs, tile)
    if support.granularity.q_block > 1:
        return
    own = mask.sum(-1).double()
    for size in TILES:
        if size > mask.shape[2]:
            break
        tiles = mask[:, :, : mask.shape[2] // size * size].unflatten(2, (-1, size))
        keys = own[:, :, : tiles.shape[2] * size].unflatten(2, (-1, size))
        first, last = tiles[:, :, :, 0], tiles[:, :, :, -1]
        tally.add(f"neighbour_overlap_{size}", (first & last).sum(-1) / (first | last).sum(-1))
        tally.add(f"union_growth_{size}", tiles.any(3).sum(-1) / keys.mean(-1))


def _dropped(
    tally: _Tally,
    selector: RankedSelector,
    mask: Bool[Tensor, "1 heads tile kv_len"],
    p: Float[Tensor, "1 q_heads tile kv_len"],
    inputs: AttentionInputs,
    tile: slice,
) -> None:
    # what each head alone would take by its own mass, at the same budget and key groups
    granularity = Granularity(kv_block=selector.granularity.kv_block, share="q_head")
    if selector.granularity.q_block > 1:
        granularity = Granularity(q_block=selector.granularity.q_block, kv_block=granularity.kv_block, share="q_head")
    head = OracleSelector(
        budget=selector.budget, granularity=granularity, sink=selector.sink, window=selector.window, pool=selector.pool
    )
    start = inputs.start + tile.start
    alone = head.select(
        AttentionInputs(q=inputs.q[:, tile], k=inputs.k, layer=inputs.layer, q_start=start, sinks=inputs.sinks, p=p)
    )
    own = alone.mask(p.shape[-1])
    dropped = own & ~mask
    tally.add("dropped_top_share_count", dropped.sum(-1) / own.sum(-1))
    tally.add("dropped_top_share_mass", p.masked_fill(~dropped, 0.0).sum(-1) / p.masked_fill(~own, 0.0).sum(-1))


def _retention_curve(
    p: Float[Tensor, "1 q_heads tile kv_len"], q_start: int, base: OracleSelector
) -> Float[Tensor, " kv_len"]:
    """Mass kept by a per-query token budget of 1, 2, ... keys, sink and window first; summed over the queries."""
    mass = p.mean(1)[0].double()
    n, kv_len = mass.shape
    t = torch.arange(q_start, q_start + n, device=p.device)[:, None]
    key = torch.arange(kv_len, device=p.device)
    forced = ((key < base.sink) | (key > t - base.window)) & (key <= t)
    ranked = mass.masked_fill(forced, 2.0).masked_fill(key > t, -1.0).argsort(dim=-1, descending=True, stable=True)
    return (mass.gather(-1, ranked).cumsum(-1) + (1 - mass.sum(-1, keepdim=True))).sum(0)


def _plan_values(curves: Sequence[Float[Tensor, " _"]], queries: int) -> dict[str, tuple[float | None, str]]:
    longest = max(len(c) for c in curves)
    # a shorter tile holds all its mass from its end on
    total = torch.stack([torch.cat([c, c[-1:].expand(longest - len(c))]) for c in curves]).sum(0)
    full = total / queries
    return {f"plan_budget@{mass:g}": (float(int((full < mass - 1e-9).sum()) + 1), "tokens") for mass in PLAN_MASSES}


def _quantile(values: Float[Tensor, " n"], q: float) -> float:
    # torch.quantile refuses more than 2**24 values
    return values.sort().values[round(q * (len(values) - 1))].item()


def _unit(metric: str) -> str:
    if metric.startswith("union_growth"):
        return "ratio"
    return {"kl_head_mean": "nats", "keys_read_mean": "keys/query"}.get(metric, "fraction")
