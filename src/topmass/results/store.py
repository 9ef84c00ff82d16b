"""Run directories: written under a temporary name, renamed when complete, resumed by key."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

from topmass.errors import RunError
from topmass.results._files import JOURNAL, RECORDS, append_line, lock, read_journal, read_parquet, write_parquet
from topmass.results.manifest import ATTEMPT, MANIFEST, difference, now, read_manifest, write_manifest
from topmass.results.schema import check_rows, schema_of

__all__ = [
    "LoadedRun",
    "Run",
    "check_free",
    "find_runs",
    "finish_partial",
    "load_run",
    "same_run",
]


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
        >>> from topmass.results import make_manifest
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
            lock(journal, partial)
            with _writing(partial):
                return cls._resume(path, manifest, journal, overwrite)
        except BaseException:
            journal.close()
            raise

    @classmethod
    def _resume(cls, path: Path, manifest: dict[str, Any], journal: FileIO, overwrite: bool) -> "Run":
        partial = _partial(path)
        batches = read_journal(journal, partial)
        this = {name: manifest[name] for name in ATTEMPT}
        rows: list[dict[str, Any]] = []
        if batches:
            manifest, rows = _merge(partial, manifest, batches, overwrite)
        if not rows:
            journal.truncate(0)
        manifest = manifest | {"attempts": [*manifest["attempts"], this | {"rows_before": len(rows)}]}
        write_manifest(partial, manifest)
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
            append_line(self._journal, line)
        self.rows += batch
        self._done |= keys

    def finish(self) -> Path:
        """Write the table, give the directory its final name, and return its path.

        Raises:
            RunError: It cannot be written.
        """
        partial = _partial(self.path)
        with _writing(partial):
            write_parquet(partial / RECORDS, schema_of(self.manifest["kind"]), self.rows)
            self.manifest |= {"finished": now(), "rows": len(self.rows)}
            write_manifest(partial, self.manifest)
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
        >>> from topmass.results import make_manifest
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
        lock(journal, partial)
        manifest = read_manifest(partial)
        rows = _rows(manifest["kind"], read_journal(journal, partial))
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
    manifest = read_manifest(path)
    if manifest.get("finished") is None or not (path / RECORDS).is_file():
        raise RunError(f"{path} has no {RECORDS}, so it is not a complete run; delete it and run its command again.")
    return LoadedRun(path=path, manifest=manifest, records=read_parquet(path / RECORDS, manifest["kind"]))


def same_run(path: str | Path, manifest: Mapping[str, Any]) -> bool:
    """Whether there is a complete run of this configuration, model and version at `path`."""
    path = Path(path)
    if not (path / RECORDS).is_file():
        return False
    stored = read_manifest(path)
    key = manifest.get("key") or list(schema_of(manifest["kind"]).key)
    return stored.get("finished") is not None and not difference(stored, {**manifest, "key": key})


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


def _merge(
    partial: Path, manifest: dict[str, Any], batches: list[list[list[Any]]], overwrite: bool
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the stored manifest, brought up to date, and its rows; nothing of it when it is to be discarded."""
    try:
        stored = read_manifest(partial)
    except RunError:
        if overwrite:
            return manifest, []
        raise
    unlike = difference(stored, manifest)
    if unlike and overwrite:
        return manifest, []
    if unlike:
        raise RunError(
            f"{partial} was started with {unlike}; use the same settings to resume it, another output directory, "
            "or discard it (--overwrite)."
        )
    rows = _rows(stored["kind"], batches)
    return manifest | {name: stored[name] for name in ("run_id", "started", "attempts")}, rows


def _rows(kind: str, batches: list[list[list[Any]]]) -> list[dict[str, Any]]:
    names = [c.name for c in schema_of(kind).columns]
    return [dict(zip(names, row, strict=True)) for batch in batches for row in batch]


def _publish(partial: Path, path: Path) -> None:
    """Rename the directory; the run that it replaces is deleted last."""
    if path.exists():
        shutil.rmtree(_old(path), ignore_errors=True)
        path.rename(_old(path))
    partial.rename(path)
    (path / JOURNAL).unlink()
    shutil.rmtree(_old(path), ignore_errors=True)
