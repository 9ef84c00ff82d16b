"""How much larger what 32 neighbouring queries select is than what one of them does, for the indexers of benchmarks without weights.

    PYTHONPATH=src python recipes/vllm/growth.py

No model: hidden states are random vectors. `random`: an indexer as training starts with it; `stress`: the one that `topmass bench` makes
where none is given. The last eight tiles of a prompt are counted. It is what a kernel that selects per query gathers, and so what
decides its time.
"""

import argparse

import torch

import topmass
from topmass.bench.stress import stress_indexer
from topmass.ops import index_topk, tile_union
from topmass.selection.indexer import Indexer, IndexerConfig, LayerIndexer, ModelFingerprint, index_rope

HIDDEN, DIM, KV_BLOCK, BUDGET, TILE, TILES, THETA = 256, 64, 4, 2048, 32, 8, 1e7
GRANULARITY = topmass.Granularity(kv_block=KV_BLOCK)
MODEL = ModelFingerprint(
    model_type="qwen3", hidden_size=HIDDEN, num_layers=1, full_layers=(0,), q_heads=4, kv_heads=1, head_dim=DIM, vocab_size=8
)  # fmt: skip
CONFIG = {0: IndexerConfig(hidden_size=HIDDEN, dim=DIM, kv_block=KV_BLOCK, rotary_dim=DIM)}
INDEXERS = {"random": Indexer.create, "stress": stress_indexer}


@torch.inference_mode()
def growth(layer: LayerIndexer, length: int) -> float:
    """Union of a tile's selections over one selection, a mean."""
    torch.manual_seed(0)
    hidden = torch.randn(1, length, HIDDEN)
    angle = torch.arange(length)[:, None] * THETA ** (-torch.arange(0, DIM, 2) / DIM)
    whole = torch.cat([angle, angle], -1)[None]
    tables = index_rope(whole.cos(), whole.sin(), DIM)
    keys = layer.finish_keys(layer.project_keys(hidden), *tables).bfloat16()
    start = length - TILE * TILES
    rows = slice(start, length)
    queries = layer.project_queries(hidden[:, rows], *(x[:, rows] for x in tables)).bfloat16()
    dtype = getattr(torch, layer.config.score_dtype)
    support = index_topk(queries, keys, budget=BUDGET, granularity=GRANULARITY, q_start=start, score_dtype=dtype)
    union = tile_union(support, tile=TILE)
    return float(union.counts.float().mean()) * KV_BLOCK / BUDGET


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(f"budget {BUDGET}, groups of {KV_BLOCK}, tiles of {TILE} queries")
    for length in (16384, 32768, 65536, 131072):
        parts = []
        for name, make in INDEXERS.items():
            layer = make(CONFIG, MODEL).layer(0)
            assert layer is not None
            parts.append(f"{name} {growth(layer, length):.1f}")
        print(f"{length} tokens: {', '.join(parts)}", flush=True)
