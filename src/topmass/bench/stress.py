"""An untrained indexer whose neighbouring queries select much alike."""

from collections.abc import Mapping

import torch

from topmass.selection.indexer import Indexer, IndexerConfig, LayerIndexer, ModelFingerprint

__all__ = ["stress_indexer"]

# weight of all dimensions but one, see `stress_indexer`; recipes/vllm/growth.py prints what it does
APART = 0.004


def stress_indexer(layers: Mapping[int, IndexerConfig], fingerprint: ModelFingerprint) -> Indexer:
    """An indexer with random weights, for models with random weights: neighbouring queries select much alike.

    Kernels that select per query gather what a tile of neighbouring queries selects between them, so that their time depends on how
    alike it is. Queries in random directions have nothing in common: 32 of them select 25 times what one does, 2,048 of 128K keys,
    where the bundled model's trained indexer needs 2.3 to 4.5 times. Here the norm of the queries keeps one dimension, whose sign
    decides between two selections, and 0.4 % of the others, which tell queries of one sign apart: 3.2 times at 16K, 3.8 at 128K, for hidden states in random directions.

    Args:
        layers: Configuration by layer index.
        fingerprint: The model that it will serve.

    Raises:
        ConfigError: The configurations contradict each other or the fingerprint.
    """
    indexer = Indexer.create(layers, fingerprint)
    with torch.no_grad():
        for layer in indexer.layers.values():
            assert isinstance(layer, LayerIndexer)
            # where RoPE turns least, so that far keys compare by content
            slowest = max(layer.config.rotary_dim // 2 - 1, 0)
            layer.q_norm.weight.fill_(APART)[slowest] = 1.0
    return indexer
