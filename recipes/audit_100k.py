"""The oracle at 100K tokens on a model of Qwen3.5-9B's shape: wall time beside the dense forward, and peak memory.

    PYTHONPATH=src python recipes/audit_100k.py --out audit-100k.json          # one GPU of 80 GB
    PYTHONPATH=src python recipes/audit_100k.py --shape tiny --tokens 3000 --device cpu --dtype float32 --budgets 64

Weights and tokens are random, so that masses say nothing of a trained model; time and memory do not depend on them. Every
full-attention layer is audited exactly: mass, top-k support at every budget, output recomputed on it. The dense forward is timed
in the same process, at once and in the audit's own chunks.
"""

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import topmass
from topmass.bench.models import build_model
from topmass.bench.ttft import describe_linear
from topmass.eval.audit import CHUNK
from topmass.integrations.transformers.linear import fast_linear_attention
from topmass.integrations.transformers.load import describe_device


def now(device: str) -> float:
    """Seconds, once the device has done everything."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(work: Callable[[], Any], device: str) -> float:
    start = now(device)
    work()
    return now(device) - start


def peak(device: str) -> float:
    """GiB allocated at most since the last call; on a CPU resident at most since the start."""
    if device != "cuda":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    found = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return found


def prefill(model: Any, ids: torch.Tensor, chunk: int) -> None:
    cache = None
    with torch.inference_mode(), fast_linear_attention(model):
        for part in ids.split(chunk, 1):
            cache = model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3.5-9b")
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--budgets", type=int, nargs="+", default=[2048])
    parser.add_argument("--q-blocks", type=int, nargs="+", default=[1])
    parser.add_argument("--forwards", action="store_true", help="also the sparse forwards that compare logits")
    parser.add_argument("--rounds", type=int, default=2, help="of each dense forward")
    parser.add_argument("--most", type=float, help="fail above this many times the dense forward")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = args.device
    model = build_model(args.shape, device=device, dtype=getattr(torch, args.dtype))
    size = model.config.get_text_config().vocab_size
    ids = torch.randint(0, size, (1, args.tokens), generator=torch.Generator().manual_seed(0)).to(device)
    weights = sum(p.nbytes for p in model.parameters()) / 2**30
    dense = {}
    for name, chunk in (("once", args.tokens), ("chunked", CHUNK)):
        # compiles and tunes for this length
        prefill(model, ids, chunk)
        peak(device)
        times = [seconds(lambda chunk=chunk: prefill(model, ids, chunk), device) for _ in range(args.rounds)]
        dense[name] = {"seconds": statistics.median(times), "all": times, "peak_gib": peak(device)}
        print(f"dense, {name}: {dense[name]}", file=sys.stderr, flush=True)
    found: list[topmass.AuditResult] = []
    units = [topmass.Granularity(q_block=g) for g in args.q_blocks]

    def audit() -> None:
        progress = lambda *done: print(*done, file=sys.stderr, flush=True)  # noqa: E731
        settings = {"budgets": args.budgets, "granularities": units, "forwards": args.forwards}
        found.append(topmass.audit(model, ids, **settings, progress=progress))

    took = seconds(audit, device)
    records = found[0].to_records()
    layers = sorted({r["layer"] for r in records} - {-1})
    masses = {
        f"layer {r['layer']}, budget {r['budget']}, q{r['q_block']}": round(r["value"], 4)
        for r in records
        if r["metric"] == "retained_mass_mean"
    }
    ratio = took / min(d["seconds"] for d in dense.values())
    summary = {
        "shape": args.shape,
        "tokens": args.tokens,
        "device": describe_device(model),
        "linear_attention": describe_linear(model),
        "versions": {"torch": torch.__version__, "topmass": topmass.__version__},
        "budgets": args.budgets,
        "q_blocks": args.q_blocks,
        "sparse_forwards": args.forwards,
        "full_attention_layers": layers,
        "weights_gib": weights,
        "dense": dense,
        "audit": {"seconds": took, "peak_gib": peak(device), "times_the_faster_dense_forward": ratio},
        "retained_mass": masses,
        "note": "random weights and tokens: masses say nothing of a trained model",
    }
    text = json.dumps(summary, indent=1)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n")
    complete = len(masses) == len(layers) * len(args.budgets) * len(args.q_blocks) and bool(layers)
    return 0 if complete and (args.most is None or ratio <= args.most) else 1


if __name__ == "__main__":
    sys.exit(main())
