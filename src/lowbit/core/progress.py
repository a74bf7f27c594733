"""How long work tells what it is doing, without knowing who listens."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """A listener: a bar in a terminal, plain lines in a log, nothing in a library."""

    def start(self, what: str, total: int) -> None:
        """A stage of `total` steps begins."""
        ...

    def note(self, text: str) -> None:
        """What is being done right now (a matrix, an error), beside the bar."""
        ...

    def advance(self) -> None:
        """One step is done."""
        ...

    def warn(self, text: str) -> None:
        """Something the user should know but that does not stop the work."""
        ...


class Silent:
    """Hears nothing."""

    def start(self, what: str, total: int) -> None: ...

    def note(self, text: str) -> None: ...

    def advance(self) -> None: ...

    def warn(self, text: str) -> None: ...
