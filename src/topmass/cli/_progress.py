"""Progress on stderr: a bar with rate and time left on a terminal, one plain line a minute elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["progress"]

Callback = Callable[[int, int, str], None]

EVERY = 60.0


@contextmanager
def progress(title: str) -> Iterator[Callback]:
    """Yield a function to call with (done, total, what is being worked on)."""
    if sys.stderr.isatty():
        with _bar(title) as callback:
            yield callback
    else:
        yield _Lines(title)


@contextmanager
def _bar(title: str) -> Iterator[Callback]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[what]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(title, total=None, what="", rate="")

        def callback(done: int, total: int, what: str) -> None:
            speed = bars.tasks[0].speed
            bars.update(task, completed=done, total=total, what=what, rate=f"{speed:.2g}/s" if speed else "")

        yield callback


class _Lines:
    """A line a minute, for logs."""

    def __init__(self, title: str):
        self.title = title
        self.start = self.last = time.monotonic()
        self.first: int | None = None

    def __call__(self, done: int, total: int, what: str) -> None:
        """Print a line if the last is a minute old."""
        now = time.monotonic()
        # what an earlier run had done says nothing of the speed of this one
        self.first = done if self.first is None else self.first
        if now - self.last < EVERY:
            return
        self.last = now
        rate = (done - self.first) / (now - self.start)
        left = f"{rate:.2g}/s, {(total - done) / rate / 60:.0f} min left" if rate > 0 else "waiting"
        print(f"{self.title}: {done}/{total} ({done / max(total, 1):.0%}), {left}; {what}", file=sys.stderr, flush=True)
