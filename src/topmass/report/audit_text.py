"""What a report says of audits: attention mass kept, its effect on the output, and what neighbouring queries share."""

import math

from topmass.report import figures
from topmass.report.aggregate import AuditTable, budget_name
from topmass.report.content import Figure, Section, Table, add_figure
from topmass.report.figures import label_of, tokens
from topmass.report.wording import NOT_CAUSAL, granularity_words
from topmass.results.stats import Interval

__all__ = ["answers", "sections"]


def answers(table: AuditTable) -> list[str]:
    """A sentence for each length with a plan."""
    return [answer for n in table.lengths if (answer := _answer(table, n))]


def _answer(table: AuditTable, length: int) -> str:
    plan = table.plan(length)
    if not plan:
        return ""
    mass = min({m for _, m, _ in plan}, key=lambda m: abs(m - 0.95))
    layers = sorted(((i, layer) for layer, m, i in plan if m == mass), key=lambda entry: entry[0].point)
    most, layer = layers[-1]
    least, other = layers[0]
    return (
        f"At {tokens(length)} tokens: {most.point:,.0f} keys per query{_range(most)} retain {mass:.0%} of the attention "
        f"mass in every full-attention layer; layer {layer} needs the most, layer {other} the least ({least.point:,.0f})."
    )


def _range(interval: Interval, spec: str = ",.0f") -> str:
    if math.isnan(interval.low):
        return ""
    return f" (95 % interval {interval.low:{spec}} to {interval.high:{spec}})"


def sections(table: AuditTable) -> list[Section]:
    """Attention mass, output, and neighbours; without what has nothing to show."""
    if not table.lengths:
        return []
    return [s for s in (_mass_section(table), _model_section(table), _neighbour_section(table)) if s.items]


def _mass_section(table: AuditTable) -> Section:
    items: list[Figure | Table] = []
    chart = figures.layer_heat_map(table, "retained_mass_mean", "retained attention mass (fraction)")
    add_figure(
        items,
        "retained-mass",
        chart,
        "Attention mass retained per layer and budget, per query, mean over queries and texts.",
    )
    caption = "Per-layer plan: smallest budget that retains the mass; bars are 95 % intervals over texts."
    add_figure(items, "plan", figures.per_layer_plan(table), caption)
    items += _plan_tables(table)
    for n in table.lengths:
        caption = f"Granularity of selection at {tokens(n)} tokens, at achieved keys; 95 % intervals over texts."
        add_figure(items, f"granularity-mass-{n}", figures.granularity_mass(table, n), caption)
        items += [t for t in [_granularity_table(table, n)] if t]
    return Section(title="Attention mass", items=items)


def _plan_tables(table: AuditTable) -> list[Table]:
    tables = []
    for n in table.lengths:
        plan = {(layer, mass): i for layer, mass, i in table.plan(n)}
        masses = sorted({mass for _, mass in plan})
        rows = [
            [str(layer), *(_number(plan.get((layer, m)), ",.0f") for m in masses)]
            for layer in sorted({x for x, _ in plan})
        ]
        header = ["layer", *(f"{m:.0%} of the mass" for m in masses)]
        if rows:
            tables.append(
                Table(caption=f"Plan at {tokens(n)} tokens: keys per query, 95 % interval.", header=header, rows=rows)
            )
    return tables


def _granularity_table(table: AuditTable, length: int) -> Table | None:
    rows = []
    for s in table.settings:
        if table.oracle(s) and (mass := table.over_layers(length, s, "retained_mass_mean")):
            keys = table.over_layers(length, s, "keys_read_mean")
            rows.append(
                [
                    budget_name(s.budget),
                    granularity_words(s.granularity),
                    _number(keys, ",.0f", bare=True),
                    _number(mass, ".3f"),
                ]
            )
    if not rows:
        return None
    return Table(
        caption=f"Retained mass at {tokens(length)} tokens, mean over layers, with 95 % interval over texts. Where queries "
        f"share, {NOT_CAUSAL}.",
        header=["budget", "granularity", "achieved keys", "retained mass"],
        rows=rows,
        folded=True,
    )


def _model_section(table: AuditTable) -> Section:
    items: list[Figure | Table] = []
    for n in table.lengths:
        rows = []
        for s in table.settings:
            values = [table.value(n, s, -1, m) for m in ("logit_kl", "top1_agreement", "ppl_change")]
            if any(values):
                note = "" if s.causal else " (not causal)"
                numbers = [_number(v, spec) for v, spec in zip(values, (".2g", ".4f", "+.2%"), strict=True)]
                rows.append(
                    [label_of(s.selector), budget_name(s.budget), granularity_words(s.granularity) + note, *numbers]
                )
        header = ["selector", "budget", "granularity", "logit KL (nats)", "top-1 agreement", "perplexity change"]
        if rows:
            caption = f"All full-attention layers sparse, {tokens(n)} tokens, with 95 % interval over texts."
            items.append(Table(caption=caption, header=header, rows=rows, folded=len(rows) > 12))
    chart = figures.layer_heat_map(table, "logit_kl", "logit KL (nats), this layer sparse alone", log=True)
    add_figure(items, "logit-kl", chart, "KL of the final logits with one layer sparse at a time.")
    return Section(title="Effect on the model's output", items=items)


def _neighbour_section(table: AuditTable) -> Section:
    items: list[Figure | Table] = []
    caption = "Growth of the union of neighbouring queries' supports: what a tile of queries must gather together."
    add_figure(items, "union-growth", figures.union_growth(table), caption)
    return Section(title="Neighbouring queries", items=items)


def _number(interval: Interval | None, spec: str, *, bare: bool = False) -> str:
    if interval is None:
        return ""
    text = f"{interval.point:{spec}}"
    return text if bare or math.isnan(interval.low) else f"{text} [{interval.low:{spec}}, {interval.high:{spec}}]"
