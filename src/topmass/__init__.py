"""How much dense attention does a long-context model need? Audit it, and read only those keys."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from topmass import errors, ops, selection
    from topmass.core.budget import Budget
    from topmass.core.granularity import Granularity
    from topmass.core.plan import Plan
    from topmass.core.rule import SupportRule
    from topmass.core.support import Support
    from topmass.distill import DistillConfig
    from topmass.distill.trainer import distill
    from topmass.eval.audit import AuditResult, audit
    from topmass.eval.runner import EvalResult, evaluate
    from topmass.eval.tasks import Sample, list_tasks, make_samples
    from topmass.integrations.transformers.reference import load_reference
    from topmass.integrations.transformers.sparsify import sparsify
    from topmass.selection import (
        DenseSelector,
        ExternalSelector,
        Indexer,
        IndexerConfig,
        IndexerSelector,
        OracleSelector,
        PooledSelector,
        PreviousLayerSelector,
        RandomSelector,
        StreamingSelector,
    )
    from topmass.selection.indexer import load_indexer, load_reference_indexer
    from topmass.selection.saved import load_selector

__version__ = "0.1.0"

_WHERE = {
    "AuditResult": "topmass.eval.audit",
    "Budget": "topmass.core.budget",
    "DenseSelector": "topmass.selection",
    "DistillConfig": "topmass.distill",
    "EvalResult": "topmass.eval.runner",
    "ExternalSelector": "topmass.selection",
    "Granularity": "topmass.core.granularity",
    "Indexer": "topmass.selection",
    "IndexerConfig": "topmass.selection",
    "IndexerSelector": "topmass.selection",
    "OracleSelector": "topmass.selection",
    "Plan": "topmass.core.plan",
    "PooledSelector": "topmass.selection",
    "PreviousLayerSelector": "topmass.selection",
    "RandomSelector": "topmass.selection",
    "Sample": "topmass.eval.tasks",
    "StreamingSelector": "topmass.selection",
    "Support": "topmass.core.support",
    "SupportRule": "topmass.core.rule",
    "audit": "topmass.eval.audit",
    "evaluate": "topmass.eval.runner",
    "list_tasks": "topmass.eval.tasks",
    "load_indexer": "topmass.selection.indexer",
    "load_reference_indexer": "topmass.selection.indexer",
    "load_reference": "topmass.integrations.transformers.reference",
    "load_selector": "topmass.selection.saved",
    "make_samples": "topmass.eval.tasks",
    "sparsify": "topmass.integrations.transformers.sparsify",
}
# `distill` is a package that can be called
_MODULES = ("distill", "errors", "ops", "selection")

__all__ = [
    "AuditResult",
    "Budget",
    "DenseSelector",
    "DistillConfig",
    "EvalResult",
    "ExternalSelector",
    "Granularity",
    "Indexer",
    "IndexerConfig",
    "IndexerSelector",
    "OracleSelector",
    "Plan",
    "PooledSelector",
    "PreviousLayerSelector",
    "RandomSelector",
    "Sample",
    "StreamingSelector",
    "Support",
    "SupportRule",
    "audit",
    "distill",
    "errors",
    "evaluate",
    "list_tasks",
    "load_indexer",
    "load_reference",
    "load_reference_indexer",
    "load_selector",
    "make_samples",
    "ops",
    "selection",
    "sparsify",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"topmass.{name}")
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'topmass' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
