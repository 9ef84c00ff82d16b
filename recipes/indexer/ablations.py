"""Ablations of the reference checkpoint's indexer: each variant trained on the same tokens, measured on the same held-out text and samples.

    PYTHONPATH=src python recipes/indexer/ablations.py data --work /tmp/ablations --workers 14
    PYTHONPATH=src python recipes/indexer/ablations.py run --work /tmp/ablations --out benchmarks/indexer-ablations --part 0/3
    PYTHONPATH=src python recipes/indexer/ablations.py run --work /tmp/ablations --out benchmarks/indexer-ablations --part 1/3
    PYTHONPATH=src python recipes/indexer/ablations.py run --work /tmp/ablations --out benchmarks/indexer-ablations --part 2/3
    PYTHONPATH=src python recipes/indexer/page.py --ablations benchmarks/indexer-ablations

Budget on one H200: at most 8 minutes. Twelve trainings of 13 million tokens (200 steps of 16 sequences of 4,096) take some 22 s each, evaluating
a variant 5 to 10 s, and what the first variant serves in other ways another minute. `data` writes the tokens once, on the CPU.

Each variant leaves a run of kind `eval` with one row per sample in `OUT/VARIANT`, and in `OUT/VARIANT.json` the held-out measurements,
the training curve and the settings. Variants that are there already are not run again.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import TELLING, Known, Library, Shares, Stored, common_options, store

import topmass
from topmass.core.granularity import Granularity
from topmass.core.support import Support
from topmass.distill import DistillConfig, indexer_kl
from topmass.distill.teacher import Lesson, Teacher
from topmass.eval.recall import support_quality
from topmass.eval.runner import evaluate_samples
from topmass.integrations.transformers.load import describe_device, weights_hash
from topmass.integrations.transformers.reference import load_reference
from topmass.ops import attention_mass
from topmass.ops.index_topk import index_topk
from topmass.results import Run, load_run, make_manifest
from topmass.selection.base import AttentionInputs
from topmass.selection.indexer import Indexer, IndexerSelector, named_indexer

SEED = 3001  # of the samples; the tables of gaps.py have others
SHARE = Fraction(1, 16)
SHARED = 32
# tokens, and held-out sequences of that length
HELD_OUT = {4096: 6, 8192: 3, 16384: 2, 32768: 1}
TILES, TILE, KL_ROWS = 16, 64, 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One indexer: how it differs from the first, and what it shows.

    Attributes:
        question: What the variant is about; variants with one question stand in one table.
        changes: Settings that differ from those of `BASE`; `None` is the indexer that ships.
    """

    question: str
    changes: Mapping[str, Any] | None = field(default_factory=dict)


BASE = {
    "dim": 64,
    "heads": 1,
    "features": "hidden",
    "q_block": 1,
    "kv_block": 1,
    "reduce": "max",
    "pool": "sum",
    "seed": 0,
}
VARIANTS = {
    "dim-64": Variant(question="dim"),
    "seed-1": Variant(question="dim", changes={"seed": 1}),
    "dim-16": Variant(question="dim", changes={"dim": 16}),
    "dim-32": Variant(question="dim", changes={"dim": 32}),
    "dim-128": Variant(question="dim", changes={"dim": 128}),
    "heads-4": Variant(question="heads", changes={"heads": 4}),
    "features-qk": Variant(question="features", changes={"features": "qk"}),
    "kv-4": Variant(question="pooling", changes={"kv_block": 4}),
    "kv-4-max": Variant(question="pooling", changes={"kv_block": 4, "pool": "max"}),
    "kv-16": Variant(question="pooling", changes={"kv_block": 16}),
    "q-32-max": Variant(question="sharing", changes={"q_block": SHARED}),
    "q-32-mean": Variant(question="sharing", changes={"q_block": SHARED, "reduce": "mean"}),
    "shipped": Variant(question="tokens", changes=None),
}
FIRST = "dim-64"


# --- training ----------------------------------------------------------------------------------------------------------


def data(args: argparse.Namespace) -> int:
    """Write training and held-out sequences once, for all variants."""
    store(
        args.work,
        length=args.length,
        sequences=args.sequences,
        seed=args.data_seed,
        measured=held_out(args),
        workers=args.workers,
    )
    print(f"{args.sequences} sequences of {args.length} tokens in {args.work}")
    return 0


def held_out(args: argparse.Namespace) -> dict[int, int]:
    """Lengths at which indexers are measured, and sequences of each; all divided by --shorter."""
    return {n // args.shorter: many for n, many in HELD_OUT.items()}


def config_of(changes: Mapping[str, Any], args: argparse.Namespace) -> DistillConfig:
    """The whole training of a variant."""
    steps = args.sequences // args.batch
    shape = {**BASE, **changes}
    return DistillConfig(
        length=args.length, steps=steps, batch=args.batch, micro_batch=args.batch, rows_fraction=1.0, lr=2e-3, patience=0, workers=0,
        budget=int(args.length * SHARE) + shape["q_block"] // 2, held_out=3, evaluate_every=max(1, steps // 10), **shape,
    )  # fmt: skip


def train(name: str, args: argparse.Namespace, model: Any) -> tuple[Indexer, dict[str, Any]]:
    """An indexer and how it came about."""
    changes = VARIANTS[name].changes
    if changes is None:
        indexer = named_indexer(args.indexer)
        return indexer, {"tokens": indexer.info.training_tokens, "recipe": dict(indexer.info.recipe)}
    config, out = config_of(changes, args), args.work / name
    start = time.perf_counter()
    if not (out / "indexer.json").is_file():
        topmass.distill(
            model, None, Stored(args.work), config, out=out, facts={"model": "reference", "weights_hash": args.hash}
        )
    seconds = time.perf_counter() - start
    rows = load_run(out).records
    curve = [
        {"step": r["step"], r["metric"]: r["value"]}
        for r in rows
        if r["layer"] == -1 and r["metric"] in ("recall", "retained_mass")
    ]
    rates = sorted(r["value"] for r in rows if r["metric"] == "tokens_per_s")
    told = {
        "tokens": config.steps * args.batch * args.length,
        "seconds": seconds,
        "tokens_per_s": rates[len(rates) // 2],
    }
    return Indexer.load(out), {
        **told,
        "curve": curve,
        "tokens_per_step": args.batch * args.length,
        "config": asdict(config),
    }


# --- held-out text -----------------------------------------------------------------------------------------------------


def quality(model: Any, indexer: Indexer, rows: Any, budget: int) -> dict[int, dict[str, float]]:
    """By layer: recall against the oracle of the same granularity, mass on the keys of either, and KL."""
    recipe = indexer.info.recipe
    pool, granularity = recipe.get("pool", "sum"), indexer.info.granularity
    assert granularity is not None
    rule = topmass.OracleSelector(budget=budget, granularity=granularity).rule(0)
    sums = {layer: torch.zeros(5, dtype=torch.float64) for layer in indexer.info.layers}

    def learn(lesson: Lesson) -> None:
        config = indexer.info.layers[lesson.layer]
        settings = {"granularity": granularity, "reduce": config.reduce}
        length = lesson.q.shape[1]
        model_settings = {"scale": lesson.scale, "softcap": lesson.softcap, "sinks": lesson.sinks}
        for lo, hi in tiles(length, budget, granularity.q_block):
            support = index_topk(
                lesson.iq[:, lo:hi],
                lesson.ik[:, : hi // granularity.kv_block],
                budget=budget,
                q_start=lo,
                score_dtype=getattr(torch, config.score_dtype),
                **settings,
            )
            mass = attention_mass(
                lesson.q[:, lo:hi], lesson.k[:, :hi], lesson.lse[:, lo:hi], q_start=lo, **model_settings
            )
            found = support_quality(support, mass, rule=rule, pool=pool)
            parts = [x.double().sum().cpu() for x in (found.recall, found.retained, found.attainable)]
            sums[lesson.layer][:4] += torch.stack([*parts, torch.tensor(found.recall.numel(), dtype=torch.float64)])
        blocks = -(-length // granularity.q_block)
        drawn = torch.randperm(blocks, generator=torch.Generator().manual_seed(length))[
            : max(1, KL_ROWS // granularity.q_block)
        ]
        kl = indexer_kl(
            lesson.q, lesson.k, lesson.lse, lesson.iq, lesson.ik, pool=pool, mask_forced=True, rows=drawn, **settings, **model_settings
        )  # fmt: skip
        sums[lesson.layer][4] += float(kl) / len(rows)

    device = next(model.parameters()).device
    with Teacher(model, indexer.to(device)).open() as teacher:
        for ids in rows:
            teacher.teach(torch.tensor(ids, dtype=torch.long)[None], learn, grad=False)
    return {
        layer: {"recall": float(s[0] / s[3]), "retained_mass": float(s[1] / s[3]), "oracle_mass": float(s[2] / s[3]), "kl": float(s[4])}
        for layer, s in sums.items()
    }  # fmt: skip


def tiles(length: int, budget: int, q_block: int) -> list[tuple[int, int]]:
    """Stretches of queries that see more than the budget, evenly spread."""
    tile = max(TILE, q_block)
    last = length // tile - 1
    places = torch.linspace(min(budget // tile + 1, last), last, TILES).round().long().unique().tolist()
    return [(p * tile, (p + 1) * tile) for p in places]


# --- tasks -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Reused(IndexerSelector):
    """The first full-attention layer's selection for all of them: one indexer, evaluated once."""

    def select(self, inputs: AttentionInputs) -> Support:
        support = inputs.carry.get("support")
        if support is None:
            support = inputs.carry["support"] = IndexerSelector.select(self, inputs)
        return support


def budget_of(indexer: Indexer, length: int) -> int:
    """Tokens with which every variant reads about as many keys: a block keeps room for its own queries and reads half of them on average."""
    assert indexer.info.granularity is not None
    return int(length * SHARE) + indexer.info.granularity.q_block // 2


def served(name: str, indexer: Indexer, length: int) -> dict[str, Any]:
    """What is evaluated with an indexer, by label: itself, and beside the first one everything that needs no training."""
    budget = int(length * SHARE)
    found: dict[str, Any] = {name: indexer.selector(budget=budget_of(indexer, length))}
    block = Granularity(q_block=SHARED)
    if VARIANTS[name].changes is None:
        found[f"{name}, shared by {SHARED}, max"] = indexer.reducing("max").selector(
            budget=budget + SHARED // 2, granularity=block
        )
    if name != FIRST:
        return found
    layers = sorted(indexer.info.layers)
    found |= {"dense": topmass.DenseSelector(), "oracle": topmass.OracleSelector(budget=budget)}
    found["oracle per KV head"] = topmass.OracleSelector(budget=budget, granularity=Granularity(share="kv_head"))
    for share in ("1/32", "1/8", "1/64,7/64", "1/32,3/32", "3/32,1/32"):
        found[f"budget {share}"] = indexer.selector(budget=Shares.parse(share).budget(length, layers))
    found |= {f"mass {m}": indexer.selector(budget=f"mass:{m}<={2 * budget}") for m in ("0.8", "0.9", "0.95")}
    for reduce in ("mean", "max"):
        found[f"shared by {SHARED}, {reduce}"] = indexer.reducing(reduce).selector(
            budget=budget + SHARED // 2, granularity=block
        )
    found["first layer's selection for both"] = Reused(indexer, budget=budget)
    return found


def measure(name: str, args: argparse.Namespace, model: Any, tokenizer: Any, library: Library) -> None:
    """Train, measure and store one variant."""
    start = time.time()
    indexer, training = train(name, args, model)
    took = time.time() - start
    stored = {n: np.load(args.work / f"measure-{n}.npy") for n in held_out(args)}
    table = {n: quality(model, indexer, rows, budget_of(indexer, n)) for n, rows in stored.items()}
    lengths = [n // args.shorter for n in (4096, 8192, 16384)]
    selectors = {n: served(name, indexer, n) for n in lengths}
    config = {
        "part": "ablation", "variant": name, "n": args.n, "tasks": args.tasks, "indexer": indexer.digest,
        "selectors": {str(n): {label: s.config() for label, s in all_.items()} for n, all_ in selectors.items()},
    }  # fmt: skip
    manifest = make_manifest(
        "eval", config, model="reference", weights_hash=args.hash, seeds={"tasks": SEED}, device=describe_device(model)
    )
    with Run.open(args.out / name, manifest) as run:
        for n in lengths:
            for task in args.tasks:
                known = Known(tokenizer)
                samples = library.take(known, task, n, 0, args.n)
                evaluate_samples(
                    model,
                    known,
                    samples,
                    selectors=selectors[n],
                    batch_tokens=min(args.batch_tokens, n * args.n),
                    run=run,
                )
        run.finish()
    about = {
        "variant": name, "question": VARIANTS[name].question, "changes": VARIANTS[name].changes, "training": training,
        "held_out": {str(n): {str(i): row for i, row in rows.items()} for n, rows in table.items()},
        "budget": str(SHARE), "device": describe_device(model), "seconds": time.time() - start,
    }  # fmt: skip
    (args.out / f"{name}.json").write_text(json.dumps(about, indent=1) + "\n")
    shown = {n: [round(rows[i]["recall"], 3) for i in sorted(rows)] for n, rows in table.items()}
    print(f"{name}: {took:.0f} s for training, {time.time() - start:.0f} s in all; recall by layer {shown}", flush=True)


def run(args: argparse.Namespace) -> int:
    """This process's variants."""
    part, parts = map(int, args.part.split("/"))
    begin = time.time()
    names = [v for v in args.variants if v != "shipped" or args.with_shipped]
    mine = [v for v in names[part::parts] if not (args.out / f"{v}.json").is_file()]
    args.out.mkdir(parents=True, exist_ok=True)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with ProcessPoolExecutor(args.workers) as pool:
        library = Library(pool, seed=SEED, keep=True)
        for n in (4096, 8192, 16384):
            for task in args.tasks:
                library.order(task, n // args.shorter, 0, args.n)
        model, tokenizer = load_reference(device=device)
        args.hash = weights_hash(model)
        for name in mine:
            if time.time() - begin > args.seconds:
                print("out of time; the same command resumes", flush=True)
                return 3
            measure(name, args, model, tokenizer, library)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["data", "run"])
    parser.add_argument("--work", type=Path, required=True, help="directory for tokens and trained variants")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/indexer-ablations"))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--part", default="0/1", help="i/n: every n-th variant from the i-th on")
    parser.add_argument(
        "--no-shipped", dest="with_shipped", action="store_false", help="leave out the indexer that ships"
    )
    parser.add_argument("--n", type=int, default=10, help="haystacks per task and length")
    parser.add_argument("--tasks", nargs="+", default=TELLING)
    parser.add_argument("--length", type=int, default=4096, help="of training sequences")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--sequences", type=int, default=3200, help="to train on")
    parser.add_argument("--data-seed", type=int, default=5)
    parser.add_argument("--shorter", type=int, default=1, help="divides the lengths that are evaluated; for a try")
    common_options(parser)
    args = parser.parse_args()
    return {"data": data, "run": run}[args.what](args)


if __name__ == "__main__":
    sys.exit(main())
