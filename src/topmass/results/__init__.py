"""Results on disk: schemas, run directories, statistics. Needs no torch."""

from topmass.results.schema import SCHEMA_VERSION, SCHEMAS
from topmass.results.store import LoadedRun, Run, find_runs, load_run, make_manifest

__all__ = ["SCHEMAS", "SCHEMA_VERSION", "LoadedRun", "Run", "find_runs", "load_run", "make_manifest"]
