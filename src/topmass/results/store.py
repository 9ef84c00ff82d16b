"""Run directories: written under a temporary name, renamed when complete, resumed by key."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

from topmass.errors import RunError
from topmass.results import _machine
from topmass.results.schema import SCHEMA_VERSION, SCHEMAS, Schema, check_rows, schema_of

__all__ = [
    "LoadedRun",
    "Run",
    "check_free",
    "find_runs",
    "finish_partial",
    "load_run",
    "make_manifest",
    "same_run",
]

MANIFEST, RECORDS, JOURNAL = "manifest.json", "records.parquet", "journal.jsonl"

# what must not change between the parts of one run; everything else is noted in `attempts`
_IDENTITY = ("schema_version", "kind", "config", "seeds", "model", "weights_hash", "key")
_ATTEMPT = ("started", "versions", "git_commit", "device", "machine", "command")


def make_manifest(
    kind: str,
    config: Mapping[str, Any],
    *,
    model: str,
    weights_hash: str | None = None,
    seeds: Mapping[str, int] | None = None,
    device: str = "cpu",
    command: str | None = None,
) -> dict[str, Any]:
    """Describe a run that is about to start.

    Args:
        kind: `"eval"`, `"audit"`, `"distill"`, `"bench"`, `"ttft"` or `"serve"`.
        config: The full resolved configuration; must be JSON.
        model: Name or path of the model.
        weights_hash: Hash of its weights.
        seeds: Every seed, by what it seeds.
        device: Device, in words.
        command: How to repeat it; `None` takes the command line of this process.
    """
    schema_of(kind)
    started = _now()
    digest = hashlib.sha256(json.dumps([kind, config, started], sort_keys=True).encode()).hexdigest()[:6]
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": f"{kind}-{started[:19].replace('-', '').replace(':', '')}-{digest}",
        "kind": kind,
        "model": model,
        "weights_hash": weights_hash,
        "config": json.loads(json.dumps(config)),
        "seeds": dict(seeds or {}),
        "device": device,
        "machine": _machine.machine(),
        "versions": _machine.versions(),
        "git_commit": _machine.git_commit(),
        "command": command or _machine.command_line(),
        "started": started,
        "finished": None,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedRun:
    """A complete run.

    Attributes:
        path: Its directory.
        manifest: What ran, on what, how.
        records: One dictionary per row, columns as in `docs/schemas.md`.
    """

    path: Path
    manifest: dict[str, Any]
    records: list[dict[str, Any]]

    @property
    def id(self) -> str:
        """Identifier that reports print."""
        return self.manifest["run_id"]

    @property
    def kind(self) -> str:
        """Kind of the run, which names its schema."""
        return self.manifest["kind"]


class Run:
    """A run being written; use as a context manager and call `finish` at the end.

    Rows go to a journal at once, one line per `append`, so that a batch is there as a whole or not at all. When the
    block is left without `finish` (an error, Ctrl-C), the unfinished directory stays and the same call resumes it.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "audit"
        >>> row = {c.name: {"str": "a", "int": 1, "float": 0.5}[c.kind] for c in schema_of("audit").columns}
        >>> with Run.open(path, make_manifest("audit", {}, model="tiny")) as run:
        ...     if not run.done((1,)):
        ...         run.append([row])
        ...     path = run.finish()
        >>> len(load_run(path).records)
        1
    """

    def __init__(self, path: Path, manifest: dict[str, Any], journal: FileIO, rows: list[dict[str, Any]]):
        self.path = path
        self.manifest = manifest
        self.rows = rows
        self.resumed = len(rows)
        self._journal = journal
        self._key: tuple[str, ...] = tuple(manifest["key"])
        self._done = {self._key_of(row) for row in rows}

    @classmethod
    def open(
        cls,
        path: str | Path,
        manifest: Mapping[str, Any],
        *,
        key: Sequence[str] | None = None,
        overwrite: bool = False,
    ) -> "Run":
        """Start a run, or resume the unfinished one of the same configuration.

        Args:
            path: The directory that the complete run will have.
            manifest: From `make_manifest`.
            key: Columns that identify a batch; `None` takes those of the schema.
            overwrite: Replace a complete run (only once the new one is complete), and discard an unfinished one of
                another configuration.

        Raises:
            RunError: The directory is taken, cannot be written, or holds an unfinished run that cannot be resumed.
        """
        path = Path(path).absolute()
        manifest = {**manifest, "key": list(key or schema_of(manifest["kind"]).key), "attempts": []}
        with _writing(path):
            _restore(path)
        check_free(path, overwrite=overwrite)
        partial = _partial(path)
        with _writing(partial):
            partial.parent.mkdir(parents=True, exist_ok=True)
            partial.mkdir(exist_ok=True)
            journal = (partial / JOURNAL).open("a+b", buffering=0)
        try:
            _lock(journal, partial)
            with _writing(partial):
                return cls._resume(path, manifest, journal, overwrite)
        except BaseException:
            journal.close()
            raise

    @classmethod
    def _resume(cls, path: Path, manifest: dict[str, Any], journal: FileIO, overwrite: bool) -> "Run":
        partial = _partial(path)
        batches = _read_journal(journal, partial)
        now = {name: manifest[name] for name in _ATTEMPT}
        rows: list[dict[str, Any]] = []
        if batches:
            manifest, rows = _merge(partial, manifest, batches, overwrite)
        if not rows:
            journal.truncate(0)
        manifest = manifest | {"attempts": [*manifest["attempts"], now | {"rows_before": len(rows)}]}
        _write_json(partial / MANIFEST, manifest)
        return cls(path, manifest, journal, rows)

    def __enter__(self) -> "Run":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._journal.close()
        if error is not None and self.rows and self.manifest["finished"] is None:
            rows = "1 row is" if len(self.rows) == 1 else f"{len(self.rows)} rows are"
            error.add_note(f"{rows} kept in {_partial(self.path)}; the same command resumes there.")

    @property
    def directory(self) -> Path:
        """Where the unfinished run lies; what is put there is part of the run."""
        return _partial(self.path)

    def _key_of(self, row: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in self._key)

    def done(self, key: Mapping[str, Any] | Sequence[Any]) -> bool:
        """Whether the batch with this key is stored; `key` is a row, or values in the order of the key columns."""
        return (self._key_of(key) if isinstance(key, Mapping) else tuple(key)) in self._done

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Store a batch of rows, all of it or nothing.

        Raises:
            RunError: It cannot be written.
            ValueError: A row does not fit the schema, or its key is stored already.
        """
        batch = check_rows(self.manifest["kind"], rows)
        keys = {self._key_of(row) for row in batch}
        if keys & self._done:
            raise ValueError(f"Rows with the key {min(keys & self._done)} are stored already.")
        if not batch:
            return
        line = json.dumps([list(row.values()) for row in batch]).encode() + b"\n"
        with _writing(_partial(self.path)):
            _append_line(self._journal, line)
        self.rows += batch
        self._done |= keys

    def finish(self) -> Path:
        """Write the table, give the directory its final name, and return its path.

        Raises:
            RunError: It cannot be written.
        """
        partial = _partial(self.path)
        with _writing(partial):
            _write_parquet(partial / RECORDS, schema_of(self.manifest["kind"]), self.rows)
            self.manifest |= {"finished": _now(), "rows": len(self.rows)}
            _write_json(partial / MANIFEST, self.manifest)
            self._journal.close()
            _publish(partial, self.path)
        return self.path


def finish_partial(
    path: str | Path, *, keep: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] | None = None, **notes: Any
) -> LoadedRun:
    """Complete the unfinished run of `path` with the rows it has, and load it.

    Its manifest stays as it was measured: no attempt is logged, because nothing is measured here. A complete run at
    `path` is replaced; it can only lie there if the unfinished one was started to overwrite it.

    Args:
        path: The directory that the complete run will have; what there is of it lies in `path` with `.partial` appended.
        keep: Takes the rows and returns those to keep; `None` keeps all.
        notes: What else the manifest is to say.

    Raises:
        RunError: There is no unfinished run, another process is writing it, or it cannot be read or written.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "audit"
        >>> row = {c.name: {"str": "a", "int": 1, "float": 0.5}[c.kind] for c in schema_of("audit").columns}
        >>> with Run.open(path, make_manifest("audit", {}, model="tiny")) as run:
        ...     run.append([row])
        >>> run = finish_partial(path, stopped="out of time")
        >>> len(run.records), len(run.manifest["attempts"]), run.manifest["stopped"]
        (1, 1, 'out of time')
    """
    path = Path(path).absolute()
    partial = _partial(path)
    with _writing(path):
        _restore(path)
    if not (partial / JOURNAL).is_file():
        raise RunError(f"There is no unfinished run at {partial}, so nothing can be completed; check the path.")
    check_free(path, overwrite=True)
    with _writing(partial):
        journal = (partial / JOURNAL).open("a+b", buffering=0)
    with journal:
        _lock(journal, partial)
        manifest = _read_manifest(partial)
        rows = _rows(manifest["kind"], _read_journal(journal, partial))
        run = Run(path, manifest | notes, journal, keep(rows) if keep else rows)
        return load_run(run.finish())


def load_run(path: str | Path) -> LoadedRun:
    """Read a complete run.

    Raises:
        RunError: There is no complete, readable run at `path`.
    """
    path = Path(path)
    if not path.is_dir():
        raise RunError(_missing(path))
    if path.name.endswith(".partial"):
        raise RunError(f"{path} is unfinished; run its command again to resume it.")
    manifest = _read_manifest(path)
    if manifest.get("finished") is None or not (path / RECORDS).is_file():
        raise RunError(f"{path} has no {RECORDS}, so it is not a complete run; delete it and run its command again.")
    return LoadedRun(path=path, manifest=manifest, records=_read_parquet(path / RECORDS, manifest["kind"]))


def same_run(path: str | Path, manifest: Mapping[str, Any]) -> bool:
    """Whether there is a complete run of this configuration, model and version at `path`."""
    path = Path(path)
    if not (path / RECORDS).is_file():
        return False
    stored = _read_manifest(path)
    key = manifest.get("key") or list(schema_of(manifest["kind"]).key)
    return stored.get("finished") is not None and not _difference(stored, {**manifest, "key": key})


def find_runs(path: str | Path) -> list[Path]:
    """Return `path` if it is a run, else the complete runs directly below it, in order of their names.

    Raises:
        RunError: There are none.
    """
    path = Path(path)
    if (path / MANIFEST).exists():
        return [path]
    if not path.is_dir():
        raise RunError(_missing(path))
    found = sorted(p.parent for p in path.glob(f"*/{MANIFEST}") if p.parent.suffix not in {".partial", ".old"})
    if not found:
        unfinished = any(path.glob(f"*.partial/{MANIFEST}"))
        hint = "the unfinished ones resume when their commands run again" if unfinished else "check the path"
        raise RunError(f"No complete run in {path}; {hint}.")
    return found


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _old(path: Path) -> Path:
    return path.with_name(path.name + ".old")


def _missing(path: Path) -> str:
    if path.exists():
        return f"{path} is a file, not a run directory."
    if _partial(path).is_dir():
        return f"{path} is unfinished (see {_partial(path).name}); run its command again to resume it."
    return f"No run at {path}; check the path."


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn failures of the file system into one line with a remedy."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        where = error.filename or path
        raise RunError(
            f"Cannot write {where}: {reason}. Choose a writable output directory with enough space."
        ) from error


def _restore(path: Path) -> None:
    """Undo a replacement that was interrupted between its two renames."""
    if _old(path).is_dir() and not path.exists():
        _old(path).rename(path)


def check_free(path: Path, *, overwrite: bool = False) -> None:
    """Refuse a directory that no run can be written to, before anything slow begins.

    Args:
        path: The directory that the complete run will have.
        overwrite: A complete run may be replaced.

    Raises:
        RunError: A file, a complete run or something else is in the way.
    """
    for p in (path, _partial(path)):
        if p.exists() and not p.is_dir():
            raise RunError(f"{p} is a file and in the way of the run directory; choose another output directory.")
    if not path.exists():
        return
    if (path / MANIFEST).exists() and (path / RECORDS).exists():
        if not overwrite:
            raise RunError(f"{path} is a complete run; choose another output directory, or overwrite it (--overwrite).")
    elif any(path.iterdir()):
        raise RunError(f"{path} exists and is not a run; choose another output directory.")


def _lock(journal: FileIO, partial: Path) -> None:
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        return
    try:
        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RunError(
            f"Another process is writing {partial}; wait for it or choose another output directory."
        ) from error
    except OSError:  # a file system without locks
        return


def _append_line(journal: FileIO, line: bytes) -> None:
    """Write all of `line`, or leave the file as it was."""
    start = journal.seek(0, os.SEEK_END)
    rest = memoryview(line)
    try:
        while rest:
            rest = rest[journal.write(rest) :]
    except BaseException:
        journal.truncate(start)
        raise


def _read_journal(journal: FileIO, partial: Path) -> list[list[list[Any]]]:
    """Return the complete batches and cut off a last line that was half written."""
    journal.seek(0)
    lines = journal.read().split(b"\n")
    batches, end = [], 0
    for i, line in enumerate(lines[:-1]):
        try:
            batches.append(json.loads(line))
        except ValueError:
            if any(lines[i + 1 :]):
                raise RunError(
                    f"{partial / JOURNAL}, line {i + 1}, is damaged; delete {partial} and start again."
                ) from None
            break
        end += len(line) + 1
    journal.truncate(end)
    journal.seek(0, os.SEEK_END)
    return batches


def _merge(
    partial: Path, manifest: dict[str, Any], batches: list[list[list[Any]]], overwrite: bool
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the stored manifest, brought up to date, and its rows; nothing of it when it is to be discarded."""
    try:
        stored = _read_manifest(partial)
    except RunError:
        if overwrite:
            return manifest, []
        raise
    difference = _difference(stored, manifest)
    if difference and overwrite:
        return manifest, []
    if difference:
        raise RunError(
            f"{partial} was started with {difference}; use the same settings to resume it, another output directory, "
            "or discard it (--overwrite)."
        )
    rows = _rows(stored["kind"], batches)
    return manifest | {name: stored[name] for name in ("run_id", "started", "attempts")}, rows


def _rows(kind: str, batches: list[list[list[Any]]]) -> list[dict[str, Any]]:
    names = [c.name for c in schema_of(kind).columns]
    return [dict(zip(names, row, strict=True)) for batch in batches for row in batch]


def _difference(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """Say what differs, empty if nothing does."""
    a, b = ({name: m.get(name) for name in _IDENTITY} for m in (stored, asked))
    a, b = (_flatten(json.loads(json.dumps(m))) for m in (a, b))
    a["topmass"], b["topmass"] = (m.get("versions", {}).get("topmass", "unknown") for m in (stored, asked))
    names = [name for name in {**a, **b} if a.get(name) != b.get(name)]
    shown = [f"{name.removeprefix('config.')} = {_short(a.get(name))}, not {_short(b.get(name))}" for name in names[:3]]
    return "; ".join(shown + [f"{len(names) - 3} more differences"] * (len(names) > 3))


def _flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, item in value.items():
        flat |= _flatten(item, f"{prefix}{name}.") if isinstance(item, dict) and item else {prefix + name: item}
    return flat


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _read_manifest(path: Path) -> dict[str, Any]:
    again = f"delete {path} and run its command again"
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path} has no {MANIFEST}, so it is not a run; check the path, or {again}.") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path / MANIFEST} cannot be read ({error}); {again}.") from error
    needed = {"run_id", *_IDENTITY, *_ATTEMPT}
    if not isinstance(manifest, dict) or manifest.get("kind") not in SCHEMAS or not needed <= manifest.keys():
        raise RunError(f"{path / MANIFEST} is not a manifest of a topmass run; {again}.")
    version = manifest.get("schema_version")
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise RunError(f"{path} has schema version {version}, this topmass reads {SCHEMA_VERSION}; upgrade topmass.")
    return manifest


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def _publish(partial: Path, path: Path) -> None:
    """Rename the directory; the run that it replaces is deleted last."""
    if path.exists():
        shutil.rmtree(_old(path), ignore_errors=True)
        path.rename(_old(path))
    partial.rename(path)
    (path / JOURNAL).unlink()
    shutil.rmtree(_old(path), ignore_errors=True)


def _write_parquet(path: Path, schema: Schema, rows: Sequence[Mapping[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {"str": pa.string(), "int": pa.int64(), "float": pa.float64()}
    fields = [
        pa.field(c.name, types[c.kind], nullable=c.nullable, metadata={"unit": c.unit, "meaning": c.meaning})
        for c in schema.columns
    ]
    table = pa.Table.from_pylist([dict(row) for row in rows], schema=pa.schema(fields))
    pq.write_table(table, path, compression="zstd")


def _read_parquet(path: Path, kind: str) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    again = f"delete {path.parent} and run its command again"
    try:
        table = pq.ParquetFile(path).read()
    except (OSError, pa.ArrowException) as error:
        raise RunError(f"{path} cannot be read ({error}); {again}.") from error
    # older runs may lack a column that may be empty
    columns = (c.name for c in schema_of(kind).columns if not c.nullable)
    if missing := [name for name in columns if name not in table.column_names]:
        raise RunError(f"{path} has no column {', '.join(missing)}, so it holds no {kind} records; {again}.")
    return table.to_pylist()
