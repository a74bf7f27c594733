"""A runtime as a child process: started behind a guard, its output read line by line, drained or killed at the end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

TAIL_LINES = 400
_GUARD = Path(__file__).with_name("guard.py")


class Child:
    """Starts at once. tail: its last lines, stdout and stderr together."""

    def __init__(self, argv: Sequence[str], variables: Mapping[str, str], on_line: Callable[[str], None]) -> None:
        """variables: its whole environment. on_line is called from a thread, for every line."""
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._on_line = on_line
        read_end, self._pipe = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(_GUARD), str(read_end), "--", *argv],
            env=dict(variables),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            pass_fds=[read_end],
            start_new_session=True,
        )
        os.close(read_end)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def exit_code(self) -> int | None:
        """None while it runs; 128 + number after a signal."""
        code = self._process.poll()
        return code if code is None or code >= 0 else 128 - code

    def wait(self, seconds: float | None = None) -> int | None:
        """Wait until it has ended; None when `seconds` pass before."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        if self._process.poll() is not None:
            self._reader.join(2)  # its last lines say why
        return self.exit_code()

    def stop(self, drain: float) -> int:
        """SIGTERM, `drain` seconds to finish what it is answering, then SIGKILL to it and all it started."""
        members = self.processes()
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        if self.wait(drain) is None:
            self._process.kill()
            self._process.wait()
        for member in {*members, *self._session()}:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        with contextlib.suppress(OSError):
            os.close(self._pipe)
        return self.exit_code() or 0

    def processes(self) -> list[psutil.Process]:
        """The runtime and all that it started, without the guard."""
        with contextlib.suppress(psutil.NoSuchProcess):
            found: list[psutil.Process] = psutil.Process(self._process.pid).children(recursive=True)
            return found
        return []

    def _session(self) -> list[psutil.Process]:
        """Whoever is left of the guard's session after the guard."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if os.getsid(process.pid) == self._process.pid and process.pid != self._process.pid:
                    found.append(process)
        return found

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.tail.append(line.rstrip("\n"))
            self._on_line(line.rstrip("\n"))
