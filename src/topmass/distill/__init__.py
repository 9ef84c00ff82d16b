"""Distillation of an indexer from a frozen model's attention mass."""

from topmass.distill.loss import indexer_kl

__all__ = ["indexer_kl"]
