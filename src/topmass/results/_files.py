"""Files of a run: the journal that it is written to, and the table that it becomes."""

import json
import os
from collections.abc import Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

from topmass.errors import RunError
from topmass.results.schema import Schema, schema_of

__all__ = ["JOURNAL", "RECORDS", "append_line", "lock", "read_journal", "read_parquet", "write_parquet"]

RECORDS, JOURNAL = "records.parquet", "journal.jsonl"


def lock(journal: FileIO, partial: Path) -> None:
    """Keep other processes from writing to the journal.

    Raises:
        RunError: One does.
    """
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


def append_line(journal: FileIO, line: bytes) -> None:
    """Write all of `line`, or leave the file as it was."""
    start = journal.seek(0, os.SEEK_END)
    rest = memoryview(line)
    try:
        while rest:
            rest = rest[journal.write(rest) :]
    except BaseException:
        journal.truncate(start)
        raise


def read_journal(journal: FileIO, partial: Path) -> list[list[list[Any]]]:
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


def write_parquet(path: Path, schema: Schema, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with their units and meanings."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {"str": pa.string(), "int": pa.int64(), "float": pa.float64()}
    fields = [
        pa.field(c.name, types[c.kind], nullable=c.nullable, metadata={"unit": c.unit, "meaning": c.meaning})
        for c in schema.columns
    ]
    table = pa.Table.from_pylist([dict(row) for row in rows], schema=pa.schema(fields))
    pq.write_table(table, path, compression="zstd")


def read_parquet(path: Path, kind: str) -> list[dict[str, Any]]:
    """Rows of a run of this kind.

    Raises:
        RunError: The file is missing, damaged, or of another kind.
    """
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
