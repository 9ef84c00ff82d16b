"""Selectors: anything that says which keys each query reads."""

from topmass.selection.base import AttentionInputs, Selector
from topmass.selection.baselines import (
    DenseSelector,
    ExternalSelector,
    PooledSelector,
    PreviousLayerSelector,
    RandomSelector,
    StreamingSelector,
)
from topmass.selection.indexer import Indexer, IndexerConfig, IndexerSelector
from topmass.selection.oracle import OracleSelector
from topmass.selection.saved import load_selector

__all__ = [
    "AttentionInputs",
    "DenseSelector",
    "ExternalSelector",
    "Indexer",
    "IndexerConfig",
    "IndexerSelector",
    "OracleSelector",
    "PooledSelector",
    "PreviousLayerSelector",
    "RandomSelector",
    "Selector",
    "StreamingSelector",
    "load_selector",
]
