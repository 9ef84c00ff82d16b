"""How a block of queries should be scored: the shipped indexer with one selection for 32 queries, reduced in each way.

    PYTHONPATH=src python recipes/indexer/sharing.py --haystacks 20 --out benchmarks/indexer-sharing     # two CPU cores: half an hour

The five tasks of the ablations at one length, 7/64 and 1/64 of the context in the two full-attention layers (1/16 of it in each with `--shares 1/16`), dense
attention and the same indexer per query beside it on the same samples. Prints points below dense and what each way gains over `max`, paired. The
same command goes on where it was stopped.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from common import TELLING, Shares
from compared import SHARED, roles
from found import Found, means

import topmass
from topmass.integrations.transformers.load import describe_device, weights_hash
from topmass.ops.index_topk.interface import Reduce
from topmass.results import Run, load_run, make_manifest

PER_QUERY = "per query"


def selectors(indexer: topmass.Indexer, shares: Shares, length: int, ways: Sequence[Reduce]) -> dict[str, Any]:
    """Dense, the indexer per query, and shared in each way."""
    own = roles(indexer, shares, length)
    shared = {how: roles(indexer.reducing(how), shares, length)["indexer shared"] for how in ways}
    return {"dense": own["dense"], PER_QUERY: own["indexer"], **shared}


def told(found: Found, length: int) -> list[str]:
    """A line for each way: its score, keys, and points beside dense attention and beside the maximum; then by task."""
    lines = []
    for name in found.labels:
        score = found.score(name, length)
        parts = [
            f"{name}: {100 * score.point:.1f} %" if score else name,
            f"{found.keys(name, length):.0f} keys a query",
        ]
        for other in ("dense", "max"):
            gap = found.difference(name, other, [length]) if name != other else None
            if gap is not None:
                parts.append(f"minus {other} {100 * gap.point:+.1f} [{100 * gap.low:+.1f}, {100 * gap.high:+.1f}]")
        lines.append("; ".join(parts))
    for task in found.tasks:
        each = means(found.rows[length], [task])
        lines.append(f"{task}: " + ", ".join(f"{name} {100 * value:.1f}" for name, value in each.items()))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/indexer-sharing"))
    parser.add_argument("--tasks", nargs="+", default=list(TELLING))
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--haystacks", type=int, default=20)
    parser.add_argument("--shares", type=Shares.parse, default=Shares.parse("7/64,1/64"))
    parser.add_argument("--ways", nargs="+", choices=get_args(Reduce), default=["max", "max_prob"])
    parser.add_argument("--seed", type=int, default=11, help="none that budget or indexer were chosen by")
    args = parser.parse_args()
    where = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = topmass.load_reference(device=where, dtype=torch.bfloat16 if where == "cuda" else torch.float32)
    indexer = topmass.load_reference_indexer()
    config = {**vars(args), "out": None, "shares": str(args.shares), "shared": SHARED, "indexer": indexer.digest}
    facts = {"model": "reference", "weights_hash": weights_hash(model), "device": describe_device(model)}
    with Run.open(args.out, make_manifest("eval", config, seeds={"samples": args.seed}, **facts)) as run:
        topmass.evaluate(
            model,
            tokenizer,
            tasks=args.tasks,
            lengths=(args.length,),
            n=args.haystacks,
            seed=args.seed,
            selectors=selectors(indexer, args.shares, args.length, args.ways),
            run=run,
            progress=lambda done, total, what: print(f"{done}/{total} {what}", flush=True),
        )
        run.finish()
    print("\n".join(told(Found([load_run(args.out)]), args.length)))


if __name__ == "__main__":
    main()
