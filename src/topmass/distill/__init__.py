"""Distillation of an indexer from a frozen model's attention mass.

`topmass.distill(model, tokenizer, data)` trains one: this package can be called, and is then `trainer.distill`.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from topmass.distill.loss import indexer_kl

if TYPE_CHECKING:
    from topmass.distill.config import DistillConfig
    from topmass.distill.data import Sequences, TaskSequences, TextSequences
    from topmass.distill.trainer import distill, untrained

__all__ = ["DistillConfig", "Sequences", "TaskSequences", "TextSequences", "distill", "indexer_kl", "untrained"]

# the loss needs no transformers, the trainer does
_WHERE = {
    "DistillConfig": "config",
    "Sequences": "data",
    "TaskSequences": "data",
    "TextSequences": "data",
    "distill": "trainer",
    "untrained": "trainer",
}


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"topmass.distill.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'topmass.distill' has no attribute {name!r}")


class _Package(ModuleType):
    """The package has the name of the function that it is for; importing it must not hide that function."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from topmass.distill.trainer import distill

        return distill(*args, **kwargs)


sys.modules[__name__].__class__ = _Package
