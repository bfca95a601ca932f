"""How a long job shows that it gets on: a bar on a terminal, a line now and then in a log."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

_LINE_EVERY_S: Final = 20.0


class IngestProgress:
    """Counts images and bytes and shows their rates."""

    def __init__(self, console: Console, bar: Progress, task: TaskID, total: int) -> None:
        self._console, self._bar, self._task, self._total = console, bar, task, total
        self._started = self._said = time.monotonic()
        self._images = self._failed = self._bytes = 0

    def encoded(self, images: int, failed: int) -> None:
        """See `workers.ingest.Progress`."""
        self._images += images
        self._failed += failed
        self._bar.update(self._task, advance=images, rates=self.rates())
        if not self._console.is_terminal and time.monotonic() - self._said > _LINE_EVERY_S:
            self._said = time.monotonic()
            self._console.print(f"{self._images} of {self._total} images, {self.rates()}")

    def wrote(self, size: int) -> None:
        """See `workers.ingest.Progress`."""
        self._bytes += size

    def rates(self) -> str:
        """Images and megabytes per second so far."""
        seconds = max(time.monotonic() - self._started, 1e-9)
        failed = f", {self._failed} failed" if self._failed else ""
        return f"{self._images / seconds:.0f} images/s, {self._bytes / seconds / 1e6:.1f} MB/s written{failed}"


@contextmanager
def ingest_progress(console: Console, total: int) -> Iterator[IngestProgress]:
    """A bar for ``total`` images, while the block runs."""
    columns = [BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rates]}"), TimeRemainingColumn()]
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        yield IngestProgress(console, bar, bar.add_task("ingest", total=total, rates=""), total)


@contextmanager
def count_progress(console: Console, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar for ``total`` things, while the block runs; it hears of so many more."""
    columns = [TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)
