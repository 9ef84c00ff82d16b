"""`topmass distill`."""

import os
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from topmass.cli._common import MODEL_OPTIONS, ModelOptions, emit, load, print_table, say
from topmass.cli._progress import progress
from topmass.results import check_free

if TYPE_CHECKING:
    from topmass.selection.indexer import Indexer

__all__ = ["distill"]


def distill(
    model: str,
    /,
    *,
    options: ModelOptions = MODEL_OPTIONS,
    out: Annotated[Path, Parameter(alias="-o")],
    data: tuple[str, ...] = ("tasks",),
    text_field: str = "text",
    length: int | None = None,
    steps: int | None = None,
    batch: int | None = None,
    micro_batch: int | None = None,
    rows_fraction: float | None = None,
    budget: int | None = None,
    q_block: int | None = None,
    kv_block: int | None = None,
    sink: int | None = None,
    window: int | None = None,
    dim: int | None = None,
    heads: int | None = None,
    features: Literal["hidden", "qk"] | None = None,
    reduce: Literal["mean", "max", "max_prob"] | None = None,
    pool: Literal["sum", "max"] | None = None,
    lr: float | None = None,
    held_out: int | None = None,
    evaluate_every: int | None = None,
    patience: int | None = None,
    checkpoint_minutes: float | None = None,
    workers: int | None = None,
    seed: int | None = None,
) -> None:
    """Train an indexer that predicts which keys the model's attention needs; the model itself stays as it is.

    What is not given is worked out from the model and the device. Ctrl-C saves; the same command goes on from there. For several
    GPUs: `torchrun --nproc-per-node 8 -m topmass.cli distill MODEL -o DIR`.

    Args:
        model: `reference`, a directory, or a hub id.
        out: Directory for the indexer and its log.
        data: Text, JSONL or Parquet files, the name of a data set (`name` or `name:configuration`), or `tasks`, the
            evaluation's own generators at other seeds.
        text_field: Key or column that holds the text.
        length: Tokens of a training sequence.
        steps: Optimiser steps at most.
        batch: Sequences per step, over all processes.
        micro_batch: Sequences per forward; less takes less memory.
        rows_fraction: Share of a sequence's rows that enter the loss.
        budget: Keys per query at which held-out recall is measured.
        q_block: Queries that will share one selection.
        kv_block: Keys pooled into one index key.
        sink: Keys that will always be read at the start.
        window: Keys that will always be read up to the query's own.
        dim: Width of an index query.
        heads: Query heads of an indexer.
        features: What the projections read: the attention input, or the layer's own queries and keys.
        reduce: Score of a query block from its queries, as it will be served; default `max_prob`, or `max` with `q_block` above 1.
        pool: Target of a key group from its tokens.
        lr: Peak learning rate.
        held_out: Sequences that are measured and not trained on.
        evaluate_every: Steps between measurements.
        patience: Measurements without a better recall after which training stops; 0 never stops early.
        checkpoint_minutes: Minutes between checkpoints.
        workers: Processes that prepare sequences.
        seed: Seed of weights, data and rows.
    """
    given: dict[str, Any] = {
        name: value
        for name, value in {
            "length": length, "steps": steps, "batch": batch, "micro_batch": micro_batch,
            "rows_fraction": rows_fraction, "budget": budget, "q_block": q_block, "kv_block": kv_block, "sink": sink,
            "window": window, "dim": dim, "heads": heads, "features": features, "reduce": reduce, "pool": pool,
            "lr": lr, "held_out": held_out, "evaluate_every": evaluate_every, "patience": patience,
            "checkpoint_minutes": checkpoint_minutes, "workers": workers, "seed": seed,
        }.items()
        if value is not None
    }  # fmt: skip
    from topmass.distill import DistillConfig
    from topmass.distill import distill as train
    from topmass.distill.data import check_data

    # complain before loading
    settings = DistillConfig(**given)
    if settings.length is not None:
        settings.resolve(positions=None, gpu=False)
    check_data(data)
    check_free(out, overwrite=options.overwrite)
    device = options.device
    if device == "auto" and "LOCAL_RANK" in os.environ:
        device = _own_device(int(os.environ["LOCAL_RANK"]))
    loaded, tokenizer, facts = load(model, options.dtype, device)
    with progress("distill") as report:
        indexer = train(
            loaded,
            tokenizer,
            "tasks" if data == ("tasks",) else data,
            settings,
            out=out,
            overwrite=options.overwrite,
            text_field=text_field,
            facts=facts,
            progress=report,
            say=say,
        )
    if int(os.environ.get("RANK", "0")):
        return
    _tell(indexer, model, out)
    if options.json:
        info = indexer.info
        emit({"indexer": str(out), "held_out": info.held_out, "recall": info.recall,
              "retained_mass": info.retained_mass, "recommended_budget": info.recommended_budget,
              "training_tokens": info.training_tokens, "layers": {str(i): asdict(c) for i, c in info.layers.items()}})  # fmt: skip


def _own_device(rank: int) -> str:
    import torch

    return f"cuda:{rank}" if torch.cuda.is_available() else "auto"


def _tell(indexer: "Indexer", model: str, out: Path) -> None:
    info = indexer.info
    held = info.held_out
    rows = [[str(i), f"{info.recall[i]:.3f}", f"{info.retained_mass[i]:.3f}"] for i in sorted(info.recall)]
    title = f"held out: {held['sequences']} sequences of {held['length']} tokens, {held['budget']} keys per query"
    print_table(title, ["layer", "recall of the oracle's keys", "retained mass"], rows)
    say(f"wrote {out} ({info.training_tokens:,} tokens)")
    say(f"next: topmass eval {shlex.quote(model)} --indexer {shlex.quote(str(out))}")
