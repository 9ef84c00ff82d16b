"""`audit`: how much dense attention each full-attention layer needs, at which granularity and budget."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from topmass.core.budget import Budget, BudgetLike
from topmass.core.granularity import Granularity
from topmass.core.plan import Plan
from topmass.core.support import Support
from topmass.errors import ConfigError, DataError
from topmass.eval.runner import Progress, check_lengths
from topmass.eval.settings import Infeasible, columns, label, oracle_grid
from topmass.integrations.transformers._session import LayerCall, Session
from topmass.integrations.transformers.families import family_of, find_layers
from topmass.integrations.transformers.linear import fast_linear_attention
from topmass.integrations.transformers.sparsify import sparsify
from topmass.ops._logits import causal_logits, rows_that_fit, softmax_and_normaliser, weighted_values
from topmass.ops.sparse_prefill.reference import expand_to_heads
from topmass.selection import AttentionInputs, OracleSelector, Selector
from topmass.selection.base import RankedSelector
from topmass.selection.oracle import check_mass

if TYPE_CHECKING:
    from topmass.results.store import Run

__all__ = ["AuditResult", "audit"]

TILES = (2, 4, 8, 16, 32, 64)
TILE = TILES[-1]
# per text: tiles of 64 queries on which the costly diagnostics are computed, and positions whose logits are compared
SAMPLED_TILES = 16
# tokens of one forward: a multiple of every tile and of every sensible q_block
CHUNK = 4096
LOGIT_ROWS = 256
PLAN_MASSES = (0.9, 0.95, 0.99)

Texts = Int[Tensor, "texts len"] | Sequence[Sequence[int]] | Sequence[Int[Tensor, " len"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditResult:
    """What an audit measured, one record per text, layer, setting and metric.

    Attributes:
        records: Rows with the columns of the `audit` schema (docs/schemas.md).
    """

    records: Sequence[Mapping[str, Any]]

    def to_records(self) -> list[dict[str, Any]]:
        """Rows with the columns of the `audit` schema."""
        return [dict(r) for r in self.records]

    def plan(self, mass: float = 0.95) -> Plan:
        """The smallest per-query budget of every layer that retains `mass`, averaged over queries and texts.

        Args:
            mass: One of the masses that every audit measures: 0.9, 0.95, 0.99.

        Raises:
            ConfigError: `mass` was not measured.
        """
        metric = f"plan_budget@{mass:g}"
        found = defaultdict(list)
        for r in self.records:
            if r["metric"] == metric:
                found[r["layer"]].append(r["value"])
        if not found:
            raise ConfigError(
                f"The audit did not measure a mass of {mass:g}; choose one of {', '.join(map(str, PLAN_MASSES))}."
            )
        layers: dict[int, Budget | None] = {
            layer: Budget(tokens=math.ceil(sum(v) / len(v))) for layer, v in sorted(found.items())
        }
        return Plan(layers=layers, note=f"smallest per-query oracle budget that retains {mass:g} of the attention mass")

    def mean(self, metric: str, *, layer: int = -1, config: str | None = None) -> float:
        """Mean of a metric over texts, for a layer (-1: the whole model) and a setting's label."""
        values = [
            r["value"]
            for r in self.records
            if r["metric"] == metric and r["layer"] == layer and (config is None or _label_of(r) == config)
        ]
        if not values:
            raise ConfigError(f"The audit has no {metric!r} for layer {layer}{f' and {config!r}' if config else ''}.")
        return sum(values) / len(values)


def audit(
    model: Any,
    input_ids: Texts,
    *,
    budgets: Sequence[BudgetLike] = (256, 1024),
    granularities: Sequence[Granularity] = (Granularity(),),
    selectors: Mapping[str, Selector] | None = None,
    sink: int = 0,
    window: int = 1,
    forwards: bool = True,
    inputs: Mapping[str, Any] | None = None,
    run: "Run | None" = None,
    progress: Progress | None = None,
) -> AuditResult:
    """Measure, per full-attention layer and over all of them, what an oracle's support keeps and what it costs.

    One dense forward per text serves all settings: retained mass, KL and output error of every layer. Then one sparse
    forward per setting with all layers sparse, and one per layer alone, compare the final logits with the dense ones.

    Args:
        input_ids: Token ids of one text or several; intervals are over texts.
        budgets: Keys per query; cells that cannot hold sink, window and one key group are left out.
        granularities: Units of selection.
        selectors: Further selectors by label, measured beside the oracle.
        sink: Keys always kept at the start, in tokens.
        window: Keys always kept up to and including the query's own, in tokens.
        forwards: Run the sparse forwards as well.
        inputs: What else every forward takes, such as `pixel_values` and their grid for prompts with images. A text is then
            run in one call instead of in chunks.
        run: An open run directory: finished texts are skipped, new rows stored as they come.
        progress: Called after every forward.

    Raises:
        ConfigError: A setting is wrong, or a text is longer than the model's positions.
        DataError: There is no text, or the attention is not a distribution (NaN weights).
        UnsupportedModelError: The model is one that topmass cannot run.

    Example:
        >>> import torch, topmass
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> result = topmass.audit(LlamaForCausalLM(config).eval(), torch.arange(32)[None], budgets=(8, 32))
        >>> round(result.mean("retained_mass_mean", layer=0, config="oracle b=32 q1 k1 layer"), 4)
        1.0
    """
    texts = _texts(model, input_ids)
    settings = _settings(budgets, granularities, selectors, sink=sink, window=window)
    layers = sorted(find_layers(model)[1])
    passes = 1 + (len(settings) * (1 + (len(layers) if len(layers) > 1 else 0)) if forwards else 0)
    records: list[dict[str, Any]] = [] if run is None else run.rows
    total, done = len(texts) * passes, 0

    def step(what: str) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total, what)

    for index, ids in enumerate(texts):
        if run is not None and run.done((index,)):
            done += passes
            continue
        rows = _audit_text(model, ids, settings, layers, forwards, inputs or {}, sink=sink, window=window, step=step)
        rows = [{**row, "text": index, "q_len": ids.shape[1]} for row in rows]
        records.extend(rows) if run is None else run.append(rows)
    return AuditResult(records=records)


def _texts(model: Any, input_ids: Texts) -> list[Int[Tensor, "1 len"]]:
    device = next(model.parameters()).device
    texts = [torch.as_tensor(ids, device=device).view(1, -1) for ids in input_ids]
    if not texts or any(ids.shape[1] == 0 for ids in texts):
        raise DataError("There is nothing to audit: a text is empty; give token ids of at least one token.")
    check_lengths(model, [ids.shape[1] for ids in texts])
    return texts


def _settings(
    budgets: Sequence[BudgetLike],
    granularities: Sequence[Granularity],
    selectors: Mapping[str, Selector] | None,
    *,
    sink: int,
    window: int,
) -> dict[str, Selector]:
    settings: dict[str, Selector] = {}
    reasons = []
    for g in granularities:
        grid = oracle_grid(
            [b if isinstance(b, int) else str(b) for b in budgets],
            (g.q_block,),
            (g.kv_block,),
            share=g.share,
            sink=sink,
            window=window,
        )
        settings |= {name: cell for name, cell in grid.items() if isinstance(cell, OracleSelector)}
        reasons += [cell.reason for cell in grid.values() if isinstance(cell, Infeasible)]
    settings |= dict(selectors or {})
    if not settings:
        raise ConfigError(reasons[0] if reasons else "There is nothing to audit; give a budget.")
    return settings


def _audit_text(
    model: Any,
    ids: Int[Tensor, "1 len"],
    settings: Mapping[str, Selector],
    layers: Sequence[int],
    forwards: bool,
    inputs: Mapping[str, Any],
    *,
    sink: int,
    window: int,
    step: Callable[[str], None],
) -> list[dict[str, Any]]:
    positions = torch.linspace(0, ids.shape[1] - 1, min(LOGIT_ROWS, ids.shape[1]), device=ids.device).long().unique()
    probe = _Probe(settings, ids.shape[1], OracleSelector(budget=sink + window + 1, sink=sink, window=window))
    whole = inputs or not family_of(find_layers(model)[0]).resumes
    chunk = ids.shape[1] if whole else max(CHUNK, probe.multiple)
    with torch.inference_mode(), fast_linear_attention(model):
        with Session(model, probe):
            dense = _log_probs(model, ids, positions, chunk, inputs)
        step("dense forward")
        rows = probe.records()
        if not forwards:
            return rows
        for name, selector in settings.items():
            with sparsify(model, selector):
                sparse = _log_probs(model, ids, positions, chunk, inputs)
                rows += _logit_records(dense, sparse, ids, positions, selector, -1)
            step(f"{name}, all layers")
            for layer in layers if len(layers) > 1 else ():
                with sparsify(model, _OneLayer(base=selector, layer=layer)):
                    sparse = _log_probs(model, ids, positions, chunk, inputs)
                    rows += _logit_records(dense, sparse, ids, positions, selector, layer)
                step(f"{name}, layer {layer} alone")
    return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class _OneLayer(Selector):
    """`base` on one layer, dense on the others."""

    name = "one_layer"
    base: Selector
    layer: int

    def rule(self, layer: int) -> Any:
        return self.base.rule(layer) if layer == self.layer else None

    def select(self, inputs: AttentionInputs) -> Support:
        return self.base.select(inputs)

    def config(self) -> dict[str, Any]:
        return {**self.base.config(), "layer": self.layer}


def _log_probs(
    model: Any, ids: Int[Tensor, "1 len"], positions: Int[Tensor, " rows"], chunk: int, inputs: Mapping[str, Any]
) -> Float[Tensor, "rows vocab"]:
    logits = torch.cat(list(_logits(model, ids, positions, chunk, inputs))).float()
    for rows in logits.split(32):
        rows.copy_(rows.log_softmax(-1))
    if not bool(logits.isfinite().any(-1).all()):
        raise DataError("The model's logits are NaN: the weights hold NaN or infinity; check the checkpoint.")
    return logits


def _logits(
    model: Any, ids: Int[Tensor, "1 len"], positions: Int[Tensor, " rows"], size: int, inputs: Mapping[str, Any]
) -> Iterator[Float[Tensor, "chunk_rows vocab"]]:
    # in chunks, so that a long text costs its cache and not its activations
    cache = None
    for lo in range(0, ids.shape[1], size):
        chunk = ids[:, lo : lo + size]
        here = positions[(positions >= lo) & (positions < lo + chunk.shape[1])] - lo
        out = model(
            input_ids=chunk, past_key_values=cache, use_cache=ids.shape[1] > size, logits_to_keep=here, **inputs
        )
        cache = out.past_key_values
        yield out.logits[0]


def _logit_records(
    dense: Float[Tensor, "rows vocab"],
    sparse: Float[Tensor, "rows vocab"],
    ids: Int[Tensor, "1 len"],
    positions: Int[Tensor, " rows"],
    selector: Selector,
    layer: int,
) -> list[dict[str, Any]]:
    kl, agree, gain = [], [], []
    known = positions < ids.shape[1] - 1
    target = ids[0, (positions + 1).clamp_max(ids.shape[1] - 1)]
    for a, b, t, k in zip(dense.split(32), sparse.split(32), target.split(32), known.split(32), strict=True):
        kl.append((a.exp() * (a - b)).nan_to_num(0.0).sum(-1))
        agree.append((a.argmax(-1) == b.argmax(-1)).float())
        gain.append((a.gather(-1, t[:, None]) - b.gather(-1, t[:, None]))[:, 0][k])
    nll = torch.cat(gain)
    values = {
        "logit_kl": (torch.cat(kl).mean().item(), "nats"),
        "top1_agreement": (torch.cat(agree).mean().item(), "fraction"),
        "ppl_change": (math.expm1(nll.mean().item()) if nll.numel() else None, "ratio"),
    }
    return _records(values, selector, layer)


def _records(values: Mapping[str, tuple[float | None, str]], selector: Selector, layer: int) -> list[dict[str, Any]]:
    setting = columns(selector)
    return [{**setting, "layer": layer, "metric": m, "value": v, "unit": u} for m, (v, u) in values.items()]


def _label_of(record: Mapping[str, Any]) -> str:
    settings = {
        name: record[name] for name in ("selector", "budget", "q_block", "kv_block", "share", "pool", "sink", "window")
    }
    return label(Infeasible(settings=settings, reason=""))


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


class _Probe:
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
            rows += _records(values, self.settings[name], layer)
        for layer, curves in self.curves.items():
            rows += [
                {**row, "budget": None} for row in _records(_plan_values(curves, self.sampled[layer]), self.base, layer)
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
