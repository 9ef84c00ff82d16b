"""Untrained indexers of benchmarks: their neighbouring queries select much alike."""

import torch

import topmass
from topmass.bench.stress import stress_indexer
from topmass.ops import index_topk, tile_union
from topmass.selection.indexer import Indexer, IndexerConfig, LayerIndexer, ModelFingerprint

MODEL = ModelFingerprint(
    model_type="llama", hidden_size=32, num_layers=1, full_layers=(0,), q_heads=2, kv_heads=1, head_dim=16, vocab_size=8
)


def growth(layer: LayerIndexer | None, length: int, budget: int) -> float:
    """What 32 neighbouring queries select between them, over what one does."""
    assert layer is not None
    hidden = torch.randn(1, length, 32, generator=torch.Generator().manual_seed(0))
    tables = ()
    if width := layer.config.rotary_dim:
        angle = torch.arange(length)[:, None] * 1e4 ** (-torch.arange(0, width, 2) / width)
        whole = torch.cat([angle, angle], -1)[None]
        tables = (whole.cos(), whole.sin())
    with torch.no_grad():
        queries, keys = layer.project_queries(hidden, *tables), layer.finish_keys(layer.project_keys(hidden), *tables)
    start, unit = length - 64, topmass.Granularity(kv_block=layer.config.kv_block)
    support = index_topk(
        queries[:, start:], keys, budget=budget, granularity=unit, q_start=start, score_dtype=torch.float16
    )
    return float(tile_union(support, tile=32).counts.float().mean()) * layer.config.kv_block / budget


def test_neighbours_select_alike_but_not_the_same() -> None:
    for config in (
        IndexerConfig(hidden_size=32, dim=16, kv_block=1, rotary_dim=16),
        IndexerConfig(hidden_size=32, dim=16, kv_block=4, rotary_dim=8),
        IndexerConfig(hidden_size=32, dim=16, kv_block=4, rotary_dim=0),
    ):
        stress, chance = stress_indexer({0: config}, MODEL), Indexer.create({0: config}, MODEL)
        assert 2 < growth(stress.layer(0), 4096, 128) < 6
        assert growth(chance.layer(0), 4096, 128) > 10


def test_it_is_an_indexer_like_any_other(tmp_path) -> None:
    stress = stress_indexer({0: IndexerConfig(hidden_size=32, dim=16)}, MODEL)
    stress.save(tmp_path)
    assert topmass.load_indexer(tmp_path).digest == stress.digest == stress_indexer(stress.info.layers, MODEL).digest
