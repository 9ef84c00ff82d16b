"""`audit`: how much dense attention each full-attention layer needs, at which granularity and budget."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from topmass.core.budget import Budget, BudgetLike
from topmass.core.granularity import Granularity
from topmass.core.plan import Plan
from topmass.core.support import Support
from topmass.errors import ConfigError, DataError
from topmass.eval.probe import PLAN_MASSES, Probe, records_of
from topmass.eval.runner import Progress, check_lengths
from topmass.eval.settings import Infeasible, label, oracle_grid
from topmass.integrations.transformers._session import Session
from topmass.integrations.transformers.families import family_of, find_layers
from topmass.integrations.transformers.linear import fast_linear_attention
from topmass.integrations.transformers.sparsify import sparsify
from topmass.selection import AttentionInputs, OracleSelector, Selector

if TYPE_CHECKING:
    from topmass.results.store import Run

__all__ = ["AuditResult", "audit"]

# tokens of one forward: a multiple of every tile and of every sensible q_block
CHUNK = 4096
# positions of a text whose logits are compared
LOGIT_ROWS = 256

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
    probe = Probe(settings, ids.shape[1], OracleSelector(budget=sink + window + 1, sink=sink, window=window))
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
    return records_of(values, selector, layer)


def _label_of(record: Mapping[str, Any]) -> str:
    settings = {
        name: record[name] for name in ("selector", "budget", "q_block", "kv_block", "share", "pool", "sink", "window")
    }
    return label(Infeasible(settings=settings, reason=""))
