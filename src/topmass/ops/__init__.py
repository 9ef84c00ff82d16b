"""Pure functions over tensors, one folder per op: interface, reference, kernels, and a README with the mathematics."""

from topmass.ops.attention_mass import attention_mass, pooled_mass
from topmass.ops.dense_prefill import dense_lse, dense_prefill
from topmass.ops.index_topk import index_topk
from topmass.ops.index_vectors import index_vectors
from topmass.ops.indexer_kl import kl_rows
from topmass.ops.sparse_prefill import sparse_prefill
from topmass.ops.tile_union import tile_union
from topmass.ops.topk_support import topk_support
from topmass.ops.write_pages import write_pages

__all__ = [
    "attention_mass",
    "dense_lse",
    "dense_prefill",
    "index_topk",
    "index_vectors",
    "kl_rows",
    "pooled_mass",
    "sparse_prefill",
    "tile_union",
    "topk_support",
    "write_pages",
]
