"""How much larger what 32 neighbouring queries select is than what one of them does, for random tokens and an untrained indexer.

    PYTHONPATH=src python recipes/vllm/growth.py

No model: tokens are random vectors, each `repeat` times in a row, and the indexer is as `topmass bench serve` makes one. The last eight
tiles of a prompt are counted. It is what a kernel that selects per query gathers, and so what decides its time.
"""

import torch

from topmass.selection.indexer import IndexerConfig, LayerIndexer, index_rope

HIDDEN, DIM, KV_BLOCK, BUDGET, TILE, TILES, THETA = 256, 64, 4, 2048, 32, 8, 1e7


@torch.inference_mode()
def growth(length: int, repeat: int) -> float:
    """Union of a tile's selections over one selection, a mean."""
    torch.manual_seed(0)
    layer = LayerIndexer(IndexerConfig(hidden_size=HIDDEN, dim=DIM, kv_block=KV_BLOCK, rotary_dim=DIM))
    hidden = torch.randn(-(-length // repeat), HIDDEN).repeat_interleave(repeat, 0)[None, :length]
    angle = torch.arange(length)[:, None] * THETA ** (-torch.arange(0, DIM, 2) / DIM)
    whole = torch.cat([angle, angle], -1)[None]
    tables = index_rope(whole.cos(), whole.sin(), DIM)
    keys = layer.finish_keys(layer.project_keys(hidden), *tables)[0]
    found = []
    for start in range(length - TILE * TILES, length, TILE):
        rows = slice(start, start + TILE)
        queries = layer.project_queries(hidden[:, rows], *(x[:, rows] for x in tables))[0, :, 0]
        chosen = (queries @ keys[: start // KV_BLOCK].T).topk(BUDGET // KV_BLOCK, -1).indices
        found.append(chosen.unique().numel() * KV_BLOCK / BUDGET)
    return sum(found) / len(found)


if __name__ == "__main__":
    print(f"budget {BUDGET}, groups of {KV_BLOCK}, tiles of {TILE} queries")
    for length in (16384, 32768, 65536, 131072):
        print(f"{length} tokens: " + ", ".join(f"repeat {r} {growth(length, r):.1f}" for r in (1, 32)), flush=True)
