"""Measure the reference checkpoint's indexer against dense attention, the oracle and the baselines, on the same samples.

    PYTHONPATH=src python recipes/indexer/gaps.py choose --out benchmarks/indexer
    PYTHONPATH=src python recipes/indexer/gaps.py test --out benchmarks/indexer --lengths 4096
    PYTHONPATH=src python recipes/indexer/gaps.py layers --out benchmarks/indexer
    PYTHONPATH=src python recipes/indexer/gaps.py test --out benchmarks/indexer-uniform --budget 1/16 --n 100 --n-far 10
    PYTHONPATH=src python recipes/indexer/gaps.py report --out benchmarks/indexer

`choose` compares budgets of at most 1/16 of the context on development seeds and writes the best to `choice.json`. `test` runs that
budget on other seeds: dense attention and the indexer on all haystacks, the oracle and the shared selection on the first
`--n-baselines` of them, baselines on the first `--n-far`. `layers` makes one full-attention layer sparse at a time. `report` prints the
tables and the checks, writes them to `gaps.md`, and exits with 1 if a check fails. It also reads the same test with the largest permitted budget in
every layer, from `OUT-uniform`, and what distillation costs, if they are there.

Every length is a run of its own that resumes where it stopped, so processes share the work by `--lengths`. `--close` publishes a run
that has not seen all its haystacks yet; its manifest then says where it stopped. With `--seconds 0` it measures nothing, needs no GPU, and publishes
what other processes left. One H200 takes, per haystack, about 10 / 22 / 45 ms dense and 14 / 30 / 70 ms sparse at 4K /
8K / 16K.
"""

import argparse
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from choice import CANDIDATES, NEAR, chosen_budget, ranked
from common import COUNTING, TELLING, common_options
from compared import FAR_ROLES, LENGTHS, LONG, candidates, one_layer, roles
from found import load_parts
from gap_report import report
from measure import Bench, Work

import topmass
from topmass.eval.tasks import list_tasks
from topmass.selection.indexer import named_indexer

# neither has made another published table
DEV_SEED, TEST_SEED = 1001, 2003


def choose(args: argparse.Namespace, bench: Bench) -> int:
    """Compare candidate budgets on the development seed; write the best one's name."""
    indexer = named_indexer(args.indexer)
    n = args.n or 10
    done = []
    for length in args.lengths or (4096, 16384):
        selectors = candidates(indexer, args.candidates, length)
        # baselines are far away: few haystacks tell
        counts = {name: n if name.split()[0] in ("dense", "indexer") else min(n, 4) for name in selectors}
        work = Work(
            part="choose", length=length, tasks=tuple(args.tasks or TELLING), seed=args.dev_seed, selectors=selectors,
            counts=counts, facts={"indexer": indexer.digest},
        )  # fmt: skip
        done.append(bench.measure(work))
    if not all(done):
        return 3
    found = ranked(load_parts(args.out, "choose"), args.candidates)
    for entry in found:
        print(json.dumps(entry))
    good = [c for c in found if c["feasible"]]
    if not good:
        print(
            "no candidate of at most 1/16 leaves streaming, random and the untrained indexer 15 points behind; give other --candidates"
        )
        return 1
    best = min(c["loss"] for c in good)
    chosen = min((c for c in good if c["loss"] <= best + NEAR), key=lambda c: (c["keys"], c["loss"]))
    choice = {"budget": chosen["budget"], "seed": args.dev_seed, "indexer": indexer.digest, "candidates": found}
    (args.out / "choice.json").write_text(json.dumps(choice, indent=2) + "\n")
    print(f"chosen: {chosen['budget']}")
    return 0


def test(args: argparse.Namespace, bench: Bench) -> int:
    """The published comparison, on seeds that chose nothing."""
    indexer, shares = named_indexer(args.indexer), chosen_budget(args)
    if args.seed == args.dev_seed:
        sys.exit("The test seed chose the budget; give another --seed.")
    done = []
    for length in args.lengths or (*LENGTHS, LONG):
        n = args.n or (300 if length in LENGTHS else 100)
        near, far = min(n, args.n_baselines), min(n, args.n_far)
        selectors = roles(indexer, shares, length)
        counts = {name: far if name in FAR_ROLES else near for name in selectors} | {"dense": n, "indexer": n}
        facts = {"indexer": indexer.digest, "budget": str(shares), "trained_length": trained_length(indexer)}
        work = Work(
            part="test", length=length, tasks=tuple(args.tasks or list_tasks()), seed=args.seed, selectors=selectors, counts=counts,
            facts=facts,
        )  # fmt: skip
        done.append(bench.measure(work))
    return 0 if all(done) else 3


def trained_length(indexer: topmass.Indexer) -> int:
    """Tokens of the longest sequence that the indexer was trained on; 0 if it does not say."""
    return int(indexer.info.recipe.get("length") or 0)


def layers(args: argparse.Namespace, bench: Bench) -> int:
    """One sparse layer at a time, on the tasks that keep a gap."""
    indexer, shares = named_indexer(args.indexer), chosen_budget(args)
    n = args.n or 50
    done = []
    for length in args.lengths or LENGTHS:
        selectors = one_layer(indexer, shares, length)
        facts = {"indexer": indexer.digest, "budget": str(shares)}
        work = Work(
            part="layers", length=length, tasks=tuple(args.tasks or COUNTING), seed=args.seed, selectors=selectors,
            counts=dict.fromkeys(selectors, n), facts=facts,
        )  # fmt: skip
        done.append(bench.measure(work))
    return 0 if all(done) else 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["choose", "test", "layers", "report"])
    parser.add_argument("--out", type=Path, required=True, help="directory of the runs")
    parser.add_argument(
        "--n", type=int, help="haystacks a task and length, instead of the published number (test: 300, at 32K 100)"
    )
    parser.add_argument("--n-baselines", type=int, default=100, help="of these for the oracle and the shared selection")
    parser.add_argument(
        "--n-far", type=int, default=50, help="of these for streaming, random, untrained, pooled, previous layer"
    )
    parser.add_argument("--lengths", type=int, nargs="+")
    parser.add_argument("--tasks", nargs="+")
    parser.add_argument("--uniform", type=Path, help="runs with 1/16 in every layer, for the report (OUT-uniform)")
    parser.add_argument("--budget", help="such as 1/16, or 1/64,7/64 by layer; instead of what `choose` wrote")
    parser.add_argument("--candidates", nargs="+", default=CANDIDATES)
    parser.add_argument("--seed", type=int, default=TEST_SEED)
    parser.add_argument("--dev-seed", type=int, default=DEV_SEED)
    parser.add_argument(
        "--close", action="store_true", help="out of time, publish what there is instead of resuming later"
    )
    common_options(parser)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.part == "report":
        return report(args)
    with ProcessPoolExecutor(args.workers) as pool:
        try:
            return {"choose": choose, "test": test, "layers": layers}[args.part](args, Bench(args, pool))
        finally:
            pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    sys.exit(main())
