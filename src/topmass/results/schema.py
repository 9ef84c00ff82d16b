"""What the columns of `records.parquet` mean; `docs/schemas.md` is generated from this file."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

__all__ = [
    "AUDIT_METRICS",
    "BENCH_METRICS",
    "SCHEMAS",
    "SCHEMA_VERSION",
    "SERVE_METRICS",
    "TTFT_METRICS",
    "Column",
    "Schema",
    "check_rows",
    "markdown",
    "schema_of",
]

SCHEMA_VERSION = 1

Kind = Literal["str", "int", "float"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column of a table of records.

    Attributes:
        name: Name in the table.
        kind: Type; `int` is 64 bits, `float` is 64 bits.
        unit: Unit of a value, empty where there is none.
        meaning: One sentence.
        nullable: Whether a row may leave it empty.
    """

    name: str
    kind: Kind
    unit: str
    meaning: str
    nullable: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Schema:
    """The table of one kind of run.

    Attributes:
        columns: In the order in which they are stored.
        key: Columns that identify one batch of rows; a run resumes after the last complete batch.
        about: What one row is.
    """

    columns: tuple[Column, ...]
    key: tuple[str, ...]
    about: str


def _column(name: str, kind: Kind, unit: str, meaning: str, *, nullable: bool = False) -> Column:
    return Column(name=name, kind=kind, unit=unit, meaning=meaning, nullable=nullable)


_SETTING = (
    _column(
        "selector",
        "str",
        "",
        "Selector: dense, oracle, indexer, untrained (an indexer before training), pooled, previous_layer, streaming, random, "
        "external, or one of yours.",
    ),
    _column("budget", "str", "", "Nominal budget: tokens, a fraction, mass:p<=cap, or a plan.", nullable=True),
    _column("q_block", "int", "tokens", "Queries that share one selection; above 1 the selection is not causal."),
    _column("kv_block", "int", "tokens", "Keys taken or left together."),
    _column("share", "str", "", "Heads that share one selection: layer, kv_head, q_head."),
    _column(
        "pool", "str", "", "How a group's score is made from its tokens: sum or max (oracle and previous_layer only)."
    ),
    _column(
        "reduce",
        "str",
        "",
        "How an indexer scores queries that share: max, max_prob or mean; null where none share, for other selectors, and before "
        "it was recorded.",
        nullable=True,
    ),
    _column("sink", "int", "tokens", "Keys always kept at the start, counted inside the budget."),
    _column("window", "int", "tokens", "Keys always kept just before the query, itself included."),
)

_EVAL = Schema(
    about="One row per sample and configuration.",
    key=("task", "length", "seed", "haystack", "question_id", "config"),
    columns=(
        _column("task", "str", "", "Task name."),
        _column("length", "int", "tokens", "Nominal length: prompt and answer together at most."),
        _column("haystack", "int", "", "Index of the haystack; questions on one haystack are one cluster."),
        _column("question_id", "int", "", "Index of the question on its haystack."),
        _column("seed", "int", "", "Seed of the task generator."),
        _column("config", "str", "", "Short label of the configuration, such as `oracle b=128 q1 k1 layer`."),
        *_SETTING,
        _column("dense_below", "int", "tokens", "Positions up to this length attend densely."),
        _column("decode", "str", "", "How generated positions attend: dense or sparse."),
        _column("fingerprint", "str", "", "Hash of the selector's configuration."),
        _column("status", "str", "", "ok, or infeasible: the budget is below the smallest workable one."),
        _column("score", "float", "fraction", "Share of the references found in the prediction.", nullable=True),
        _column("prediction", "str", "", "Generated text.", nullable=True),
        _column("references", "str", "", "Expected answers, a JSON list."),
        _column("prompt_tokens", "int", "tokens", "Exact length of the prompt."),
        _column(
            "keys_read_mean",
            "float",
            "keys/query",
            "Achieved keys per query, mean over prefill positions and over the full-attention layers.",
            nullable=True,
        ),
        _column(
            "seconds",
            "float",
            "s",
            "Wall time of prefill and decoding of the batch, divided by its samples.",
            nullable=True,
        ),
        _column(
            "backend",
            "str",
            "",
            "Kernels of the sparse attention that ran, from the receipt; `dense` where none did.",
            nullable=True,
        ),
        _column(
            "support_recall",
            "float",
            "fraction",
            "Share of the oracle's keys, at the same budget and granularity, in the supports: mean over sampled prompt "
            "queries of the batch and over layers; empty where every query is dense.",
            nullable=True,
        ),
    ),
)

_AUDIT = Schema(
    about="One row per text, layer, setting and metric.",
    key=("text",),
    columns=(
        _column("text", "int", "", "Index of the text; texts are the clusters of every interval."),
        _column(
            "layer",
            "int",
            "",
            "Layer, sparse alone where logits are compared; -1 is the whole model with every layer sparse.",
        ),
        *_SETTING,
        _column("q_len", "int", "tokens", "Length of the text."),
        _column("metric", "str", "", "What `value` is, see below."),
        _column("value", "float", "", "The value.", nullable=True),
        _column("unit", "str", "", "Unit of `value`."),
    ),
)

_DISTILL = Schema(
    about="One row per step, layer and metric. Held-out metrics are there at the steps at which they were measured.",
    key=("step",),
    columns=(
        _column("step", "int", "", "Optimiser steps taken."),
        _column("layer", "int", "", "Layer; -1 is the mean over layers, or the whole run."),
        _column(
            "metric",
            "str",
            "",
            "kl, grad_norm, lr, tokens_per_s; held out: recall, retained_mass, oracle_mass.",
        ),
        _column("value", "float", "", "The value.", nullable=True),
        _column("unit", "str", "", "Unit of `value`."),
    ),
)

_BENCH = Schema(
    about="One row per configuration, timed thing, metric and round.",
    key=("shape", "length", "what", "config"),
    columns=(
        _column("shape", "str", "", "Name of the attention shape."),
        _column("q_heads", "int", "", "Query heads."),
        _column("kv_heads", "int", "", "Heads of keys and values."),
        _column("head_dim", "int", "", "Width of every head."),
        _column("length", "int", "tokens", "Prompt length."),
        _column(
            "what",
            "str",
            "",
            "What is timed: layer, oracle or kl; also the name of its total. growth: a model's own U/K.",
        ),
        _column("config", "str", "", "Short label of the configuration, such as `b=2048 q1 k4 layer u=1.5`."),
        _column("budget", "str", "", "Nominal budget: tokens or a fraction."),
        _column("q_block", "int", "tokens", "Queries that share one selection."),
        _column("kv_block", "int", "tokens", "Keys taken or left together."),
        _column("growth", "float", "ratio", "Union growth that the inputs were made for; empty: none.", nullable=True),
        _column("name", "str", "", "What the row is of: a dense kernel, a stage, the total, a ceiling."),
        _column(
            "role", "str", "", "dense, stage (they sum to about the total), part (inside a stage), total, or ceiling."
        ),
        _column("backend", "str", "", "Kernel that ran."),
        _column("round", "int", "", "Round of the timing; -1 for what is not timed."),
        _column("metric", "str", "", "What `value` is, see below."),
        _column("value", "float", "", "The value; empty where the kernel is not there.", nullable=True),
        _column("unit", "str", "", "Unit of `value`."),
        _column("status", "str", "", "ok, or why the kernel is not there."),
    ),
)

_TTFT = Schema(
    about="One row per prompt shape, way to attend, metric and round; all ways of one prompt shape ran interleaved.",
    key=("length", "batch"),
    columns=(
        _column("length", "int", "tokens", "Prompt length, exact."),
        _column("batch", "int", "prompts", "Prompts computed together."),
        _column("chunk", "int", "tokens", "Tokens of a prompt computed in one forward; 0: all of them."),
        _column("name", "str", "", "Short label of the way to attend."),
        _column("role", "str", "", "dense, sparse, or floor: attention replaced by a copy of the values."),
        *_SETTING,
        _column("dense_below", "int", "tokens", "Positions up to this length attend densely."),
        _column("decode", "str", "", "How generated positions attend: dense or sparse."),
        _column("fingerprint", "str", "", "Hash of the selector's configuration; empty for the floor."),
        _column("backend", "str", "", "Kernels that ran, from the receipts."),
        _column("receipt", "str", "", "What each full-attention layer did, a JSON list; empty for the model as it is."),
        _column("round", "int", "", "Round of the timing; -1 for what is not timed."),
        _column("metric", "str", "", "What `value` is, see below."),
        _column("value", "float", "", "The value; empty where it did not run.", nullable=True),
        _column("unit", "str", "", "Unit of `value`."),
        _column("status", "str", "", "ok, or why it did not run."),
    ),
)

_SERVE = Schema(
    about="One row per case, mode, request and metric; all modes of a case answered the same requests.",
    key=("driver", "length", "rate"),
    columns=(
        _column("driver", "str", "", "offline: the engine alone; server: the OpenAI-compatible server."),
        _column("length", "int", "tokens", "Prompt length, exact."),
        _column("rate", "float", "requests/s", "Mean rate of requests (Poisson); 0: one after the other."),
        _column(
            "mode",
            "str",
            "",
            "dense, sparse (or sparse q32), or floor: attention of prompts replaced by a copy of the values.",
        ),
        _column("request", "int", "", "Index of the request; -1 for what is of all of them."),
        _column("metric", "str", "", "What `value` is, see below."),
        _column("value", "float", "", "The value.", nullable=True),
        _column("unit", "str", "", "Unit of `value`."),
        _column("status", "str", "", "ok, or why it did not run."),
    ),
)

SCHEMAS: dict[str, Schema] = {
    "eval": _EVAL,
    "audit": _AUDIT,
    "distill": _DISTILL,
    "bench": _BENCH,
    "ttft": _TTFT,
    "serve": _SERVE,
}

AUDIT_METRICS: dict[str, tuple[str, str]] = {
    "retained_mass_mean": ("fraction", "Attention mass on the support, averaged over heads; mean over queries."),
    "retained_mass_p5": ("fraction", "The same, 5th percentile over queries."),
    "retained_mass_p50": ("fraction", "The same, median over queries."),
    "kl_head_mean": (
        "nats",
        "KL(sparse ‖ dense attention), which is -log of a head's retained mass; mean over heads and queries.",
    ),
    "output_rel_error": (
        "fraction",
        "Relative error (2-norm over all heads) of the attention output before gate and projection; mean over queries.",
    ),
    "dropped_top_share_count": (
        "fraction",
        "Share of the keys a head alone would take, at the same budget, that the shared selection drops; sampled tiles.",
    ),
    "dropped_top_share_mass": ("fraction", "The same, by that head's mass."),
    "neighbour_overlap_N": (
        "fraction",
        "Jaccard overlap of the supports of the first and the last query of a tile of N (N = 2..64); sampled, q_block 1.",
    ),
    "union_growth_N": (
        "ratio",
        "Keys in the union over a tile of N queries / mean keys of its queries (N = 2..64); sampled, q_block 1.",
    ),
    "keys_read_mean": ("keys/query", "Achieved keys per query, mean over all queries."),
    "logit_kl": ("nats", "KL(dense ‖ sparse) of the next-token distributions, mean over at most 256 positions."),
    "top1_agreement": ("fraction", "Share of those positions whose most likely next token is the same."),
    "ppl_change": ("ratio", "Perplexity of the sparse model over that of the dense one at those positions, minus 1."),
    "plan_budget@M": (
        "tokens",
        "Smallest per-query budget of the layer that retains the mass M on average; sampled tiles.",
    ),
}

BENCH_METRICS: dict[str, tuple[str, str]] = {
    "time": ("ms", "Time of one call in one round."),
    "flop": ("FLOP", "Floating-point operations that the result needs: causal pairs for dense, keys read for sparse."),
    "bytes": (
        "B",
        "Bytes that a copy reads and writes; of `index` its scores in float16, written and read once; of `attend` keys and "
        "values of each tile's union of 32 queries, queries and outputs.",
    ),
    "keys_read_mean": ("keys/query", "Achieved keys per query, mean over all queries."),
    "union_growth": (
        "ratio",
        "Key groups in the union over a tile of 32 queries / mean groups that one of its query blocks selects.",
    ),
    "peak_memory": ("GiB", "Memory that the total takes at its peak, beside its inputs."),
    "gate_error": (
        "",
        "Largest error against float64 on the checked rows; of `kl` the largest relative error (2-norm).",
    ),
    "gate_plain_error": ("", "The same of plain PyTorch in the dtype of the inputs."),
    "gate_rows": ("rows", "Selections checked against scores in float64."),
    "gate_near_ties": ("rows", "Those that differ from the exact ones, within the rounding of scores."),
    "gate_largest_gap": ("", "Most that a group left out scores above one taken."),
}

TTFT_METRICS: dict[str, tuple[str, str]] = {
    "ttft": (
        "ms",
        "Wall time from the prompt's ids on the device to the last token's logits on the host, cache written, one round.",
    ),
    "layer": (
        "ms",
        "Time in a full-attention module, its projections included: mean over these layers, summed over a prompt's chunks.",
    ),
    "tpot": ("ms", "Wall time per generated token after that prompt."),
    "keys_read_mean": ("keys/query", "Achieved keys per prompt query, mean over the full-attention layers."),
    "peak_memory": ("GiB", "Most memory allocated on the device during a prompt, weights included."),
    "index_memory": ("MiB", "Index keys and their RoPE tables beside the cache after the prompt."),
    "kv_memory": ("MiB", "Keys and values in the cache after the prompt."),
    "gate_error": ("", "Largest error of a layer's attention output against float64 on the same inputs, short prompt."),
    "gate_plain_error": ("", "The same of plain PyTorch in the model's dtype."),
    "gate_logits_error": (
        "",
        "Relative error (2-norm) of that prompt's last logits against the same model with attention in float64.",
    ),
    "gate_logits_plain_error": ("", "The same with plain PyTorch's attention in the model's dtype."),
}

SERVE_METRICS: dict[str, tuple[str, str]] = {
    "ttft": ("ms", "From the moment at which a request is due to its first token at the client."),
    "tpot": ("ms", "Between tokens of a request: from its first to its last, by the tokens between."),
    "latency": ("ms", "From the moment at which a request is due to its last token."),
    "throughput": (
        "tokens/s",
        "Generated tokens of all requests, by the time from the first's moment to the last token.",
    ),
    "prompt_throughput": ("tokens/s", "Prompt tokens, likewise."),
    "prefix_hits": ("fraction", "Share of the prompts' tokens that were in the prefix cache."),
    "kv_usage": (
        "fraction",
        "Largest share of the KV cache's blocks in use; of a server as its metrics showed it, ten times a second.",
    ),
    "kv_memory": ("GiB", "The same in memory, index keys and states of linear layers included; offline only."),
}

_TYPES: dict[Kind, type | tuple[type, ...]] = {"str": str, "int": int, "float": (int, float)}


def schema_of(kind: str) -> Schema:
    """Return the schema of a kind of run.

    Raises:
        ValueError: `kind` is unknown.
    """
    if kind not in SCHEMAS:
        raise ValueError(f"Unknown kind of run {kind!r}; known: {', '.join(SCHEMAS)}.")
    return SCHEMAS[kind]


def check_rows(kind: str, rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows with the columns in order, empty nullable ones filled with `None`.

    Raises:
        ValueError: A column is unknown, missing or of another type.

    Example:
        >>> row = {c.name: {"str": "a", "int": 1, "float": 0.5}[c.kind] for c in SCHEMAS["audit"].columns}
        >>> check_rows("audit", [row])[0]["value"]
        0.5
    """
    schema = schema_of(kind)
    return [_check_row(schema, kind, row) for row in rows]


def _check_row(schema: Schema, kind: str, row: Mapping[str, Any]) -> dict[str, Any]:
    unknown = sorted(set(row) - {c.name for c in schema.columns})
    if unknown:
        raise ValueError(f"{kind} records have no column {', '.join(map(repr, unknown))}.")
    return {c.name: _check_value(c, row.get(c.name)) for c in schema.columns}


def _check_value(column: Column, value: Any) -> str | int | float | None:
    if value is None and column.nullable:
        return None
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, _TYPES[column.kind]):
        raise ValueError(f"Column {column.name!r} must be of type {column.kind}, got {value!r}.")
    if column.kind == "float" and isinstance(value, (int, float)):
        return None if column.nullable and math.isnan(value) else float(value)
    return value


def markdown() -> str:
    """Return the text of `docs/schemas.md`."""
    parts = [
        "# Record schemas",
        f"Schema version {SCHEMA_VERSION}. Generated from `topmass.results.schema`; do not edit.",
        "A run is a directory with `manifest.json` (what ran, on what, with which configuration) and `records.parquet`.",
        "Records are tidy: aggregates are always recomputed from them.",
    ]
    for kind, schema in SCHEMAS.items():
        rows = [
            f"| `{c.name}` | {c.kind}{', may be empty' if c.nullable else ''} | {c.unit} | {c.meaning} |"
            for c in schema.columns
        ]
        key = ", ".join(f"`{name}`" for name in schema.key)
        head = f"{schema.about} An interrupted run resumes by {key}."
        parts += [f"## {kind}", head, "\n".join(["| column | type | unit | meaning |", "|---|---|---|---|", *rows])]
    metrics = [f"| `{name}` | {unit} | {meaning} |" for name, (unit, meaning) in AUDIT_METRICS.items()]
    parts += ["### Metrics of an audit", "\n".join(["| metric | unit | meaning |", "|---|---|---|", *metrics])]
    metrics = [f"| `{name}` | {unit} | {meaning} |" for name, (unit, meaning) in BENCH_METRICS.items()]
    parts += ["### Metrics of a benchmark", "\n".join(["| metric | unit | meaning |", "|---|---|---|", *metrics])]
    metrics = [f"| `{name}` | {unit} | {meaning} |" for name, (unit, meaning) in TTFT_METRICS.items()]
    parts += [
        "### Metrics of a time to first token",
        "\n".join(["| metric | unit | meaning |", "|---|---|---|", *metrics]),
    ]
    metrics = [f"| `{name}` | {unit} | {meaning} |" for name, (unit, meaning) in SERVE_METRICS.items()]
    parts += ["### Metrics of serving", "\n".join(["| metric | unit | meaning |", "|---|---|---|", *metrics])]
    return "\n\n".join(parts) + "\n"
