"""`lowbit serve` as a user starts it, for tests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

LOWBIT = str(Path(sys.executable).with_name("lowbit"))


def variables(state: Path, **more: str) -> dict[str, str]:
    """The environment variables with a state directory of the test's own."""
    return {**os.environ, "XDG_STATE_HOME": str(state), "XDG_CACHE_HOME": str(state / "cache"), **more}


def run(state: Path, *arguments: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    """A command that ends."""
    return subprocess.run(
        [LOWBIT, *map(str, arguments)], capture_output=True, text=True, timeout=600, env=variables(state, **more)
    )


class Serving:
    """A server in the foreground; `ready` is its ready line."""

    def __init__(self, state: Path, *arguments: str | Path, **more: str) -> None:
        argv = [LOWBIT, "serve", *map(str, arguments), "--port", "0", "--json"]
        self.process = subprocess.Popen(
            argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables(state, **more)
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self._reader.join(5)
            raise AssertionError("\n".join(self.lines))
        self.ready: dict[str, Any] = json.loads(line)

    def __enter__(self) -> Serving:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)

    @property
    def children(self) -> list[psutil.Process]:
        """The guard and the runtime."""
        found: list[psutil.Process] = psutil.Process(self.process.pid).children(recursive=True)
        return found

    def stderr(self) -> str:
        """All of it, once the process has ended."""
        self._reader.join(10)
        return "\n".join(self.lines)

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines.extend(line.rstrip("\n") for line in self.process.stderr)


def until(done: Callable[[], bool], seconds: float = 20.0) -> bool:
    """Wait until `done`, `seconds` at most."""
    end = time.monotonic() + seconds
    while not done() and time.monotonic() < end:
        time.sleep(0.02)
    return done()
