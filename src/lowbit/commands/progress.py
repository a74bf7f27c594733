"""Progress for people: a bar with time left in a terminal, plain lines elsewhere; always on stderr."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichBar

_LINE_EVERY = 10.0  # seconds between plain lines of a log


def listener(*, quiet: bool) -> Bar | Lines | Quiet:
    """The listener that suits stderr. Use as a context manager."""
    if quiet:
        return Quiet()
    return Bar() if sys.stderr.isatty() else Lines()


def spoken(seconds: float) -> str:
    """A duration as people say it: 95 s, 12 min, 3 h 20 min."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


class Quiet:
    """Only warnings."""

    def __enter__(self) -> Quiet:
        return self

    def __exit__(self, *error: object) -> None: ...

    def start(self, what: str, total: int) -> None: ...

    def note(self, text: str) -> None: ...

    def advance(self) -> None: ...

    def warn(self, text: str) -> None:
        print(f"warning: {text}", file=sys.stderr, flush=True)


class Lines(Quiet):
    """A line when a stage starts, every ten seconds, and when it ends."""

    def start(self, what: str, total: int) -> None:
        self.what, self.total, self.done = what, total, 0
        self.started = self.told = time.monotonic()
        print(f"{what}: {total} steps", file=sys.stderr, flush=True)

    def advance(self) -> None:
        self.done += 1
        now = time.monotonic()
        if self.done == self.total or now - self.told >= _LINE_EVERY:
            self.told = now
            passed = now - self.started
            left = passed / self.done * (self.total - self.done)
            said = f"{self.what}: {self.done}/{self.total}, {spoken(passed)}, {spoken(left)} left"
            print(said, file=sys.stderr, flush=True)


class Bar(Quiet):
    """A live bar."""

    def __enter__(self) -> Bar:
        self.task: TaskID | None = None
        self.bar = RichBar(
            TextColumn("{task.description:>10}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            console=Console(file=sys.stderr),  # this stream, even while a library's own bars are kept from it
        )
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def start(self, what: str, total: int) -> None:
        self.task = self.bar.add_task(what, total=total, note="")

    def note(self, text: str) -> None:
        if self.task is not None:
            self.bar.update(self.task, note=text)

    def advance(self) -> None:
        if self.task is not None:
            self.bar.advance(self.task)

    def warn(self, text: str) -> None:
        self.bar.console.print(f"[yellow]warning:[/] {text}")
