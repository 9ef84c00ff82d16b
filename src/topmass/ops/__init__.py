"""Pure functions over tensors, one folder per op: interface, reference, kernels, and a README with the mathematics."""

from topmass.ops.attention_mass import attention_mass
from topmass.ops.dense_prefill import dense_prefill
from topmass.ops.index_topk import index_topk
from topmass.ops.sparse_prefill import sparse_prefill
from topmass.ops.topk_support import topk_support

__all__ = ["attention_mass", "dense_prefill", "index_topk", "sparse_prefill", "topk_support"]
