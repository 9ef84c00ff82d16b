"""How the budget is chosen: candidates on development seeds, the best of them, and the section that says so."""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from common import Shares
from compared import FAR_ROLES, LARGEST
from found import Found, means
from gap_tables import points, sentence, table
from promises import FAR

from topmass.results import LoadedRun

# shares of the context in the first and in the second full-attention layer, or in both
CANDIDATES = ("1/16", "1/32", "1/64,7/64", "1/32,3/32", "3/32,1/32", "7/64,1/64", "1/16v", "1/32,3/32v")
# candidates this near are equal, and the one that reads fewer keys is taken
NEAR = 0.002


def ranked(runs: Sequence[LoadedRun], specs: Sequence[str]) -> list[dict[str, Any]]:
    """What every candidate loses, pooled over the lengths that ran, and how far the baselines are."""
    found = []
    for spec in specs:
        losses: dict[str, list[float]] = defaultdict(list)
        keys = []
        for run in runs:
            few = {r["haystack"] for r in run.records if r["config"] == f"random {spec}"}
            score = means(run.records)
            paired = means(r for r in run.records if r["haystack"] in few)
            losses["indexer"].append(score["dense"] - score.get(f"indexer {spec}", float("-inf")))
            for name in ("streaming", "random", "untrained"):
                losses[name].append(paired["dense"] - paired.get(f"{name} {spec}", float("nan")))
            read = [r["keys_read_mean"] for r in run.records if r["config"] == f"indexer {spec}"]
            length = run.manifest["config"]["length"]
            keys.append(sum(read) / len(read) / length if read and None not in read else float("inf"))
        mean = {name: sum(x) / len(x) for name, x in losses.items()}
        far = min(mean[name] for name in ("streaming", "random", "untrained"))
        found.append(
            {"budget": spec, "loss": mean["indexer"], "keys": sum(keys) / len(keys), "nearest_baseline": far,
             "feasible": far >= FAR and Shares.parse(spec).mean <= LARGEST}
        )  # fmt: skip
    return found


def chosen_budget(args: argparse.Namespace) -> Shares:
    """The budget that was asked for, or the one that `choose` wrote."""
    if args.budget:
        return Shares.parse(args.budget)
    path = args.out / "choice.json"
    if not path.is_file():
        sys.exit(f"There is no {path}; run the part `choose` first, or give --budget.")
    return Shares.parse(json.loads(path.read_text())["budget"])


def choice_parts(runs: Sequence[LoadedRun]) -> list[str]:
    """The candidates for the budget on the development seed."""
    found = Found(runs)
    specs = [label.removeprefix("indexer ") for label in found.labels if label.startswith("indexer ")]
    lengths = found.lengths
    rows = [
        [spec, f"{Shares.parse(spec).mean}", points(found.difference("dense", f"indexer {spec}", lengths)),
         *(points(found.difference("dense", f"{name} {spec}", lengths)) for name in FAR_ROLES[:3])]
        for spec in specs
    ]  # fmt: skip
    counted = " and ".join(f"{found.haystacks('dense', n)} haystacks at {n:,}" for n in lengths)
    path = runs[0].path.parent / "choice.json"
    chosen = json.loads(path.read_text())["budget"] if path.is_file() else None
    return [
        f"Points below dense attention on the development seed, {sentence(found.tasks)}, {counted} together; baselines on fewer."
        + (
            f" Of the candidates within {100 * NEAR:.1f} points of the best, {chosen} read the fewest keys."
            if chosen
            else ""
        ),
        table(["budget by layer", "mean", "indexer", *FAR_ROLES[:3]], rows),
    ]
