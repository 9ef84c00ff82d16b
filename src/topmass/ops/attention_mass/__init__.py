"""Attention mass: the model's own probabilities, averaged over heads. See README.md."""

from topmass.ops.attention_mass.interface import attention_mass, pooled_mass

__all__ = ["attention_mass", "pooled_mass"]
