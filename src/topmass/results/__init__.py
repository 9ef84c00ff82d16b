"""Results on disk: schemas, run directories, statistics. Needs no torch."""

from topmass.results._machine import machine as machine_facts
from topmass.results.manifest import make_manifest
from topmass.results.schema import SCHEMA_VERSION, SCHEMAS
from topmass.results.store import (
    LoadedRun,
    Run,
    check_free,
    find_runs,
    finish_partial,
    load_run,
    same_run,
)

__all__ = [
    "SCHEMAS",
    "SCHEMA_VERSION",
    "LoadedRun",
    "Run",
    "check_free",
    "find_runs",
    "finish_partial",
    "load_run",
    "machine_facts",
    "make_manifest",
    "same_run",
]
