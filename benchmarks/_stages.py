"""How long each stage of a run takes: a listener to lowbit's progress with a clock."""

from __future__ import annotations

import time


class Stages:
    """A stage counts from its start to its last step; the last stage to the end of the run, with what finishes the files."""

    def __init__(self) -> None:
        self._spans: list[tuple[str, float, float]] = []

    def start(self, what: str, total: int) -> None:
        now = time.perf_counter()
        self._spans.append((what, now, now))

    def note(self, text: str) -> None: ...

    def advance(self) -> None:
        what, begun, _ = self._spans[-1]
        self._spans[-1] = what, begun, time.perf_counter()

    def warn(self, text: str) -> None: ...

    def finish(self) -> dict[str, float]:
        """The run is over: seconds of each stage, in order."""
        if self._spans:
            self.advance()
        seconds: dict[str, float] = {}
        for what, begun, ended in self._spans:
            seconds[what] = seconds.get(what, 0.0) + ended - begun
        return seconds
