"""A runtime that was started: ready once a completion came back, reported when it ends, drained when it is stopped."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Mapping, Sequence

import psutil

from lowbit.core.errors import ServeError
from lowbit.runtimes.child import Child
from lowbit.runtimes.client import Client, RefusedError, UnreachableError
from lowbit.runtimes.diagnose import diagnose, quote

_POLL = 0.2


class Server:
    """Starts at once. title: the runtime's name for messages. client: how it will be asked."""

    def __init__(
        self,
        title: str,
        argv: Sequence[str],
        variables: Mapping[str, str],
        client: Client,
        on_line: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.title, self.client = title, client
        self._started = time.monotonic()
        self.ready_seconds = 0.0
        self._child = Child(argv, variables, on_line)

    def wait_ready(self, patience: float) -> float:
        """Seconds from the start until it answered a completion; /health alone proves nothing.

        Raises ServeError when it ends before, when it answers with an error, or after `patience` seconds.
        """
        trouble = "it did not listen"
        while (passed := time.monotonic() - self._started) < patience:
            if self._child.exit_code() is not None:
                raise self.crash("before it was ready")
            try:
                probe = Client(self.client.url, self.client.model, self.client.key, max(patience - passed, 1))
                if probe.complete("Hello", max_tokens=1, temperature=0).get("choices"):
                    self.ready_seconds = time.monotonic() - self._started
                    return self.ready_seconds
            except UnreachableError as error:
                trouble = error.message
            except RefusedError as error:
                trouble = error.message
                if error.status not in (500, 502, 503, 404):
                    raise
            self._child.wait(_POLL)
        raise ServeError(
            f"{self.title} was not ready after {patience:.0f} seconds: {trouble}; it was stopped."
            f"{quote(self._child.tail)}",
            hint="--patience SECONDS waits longer",
        )

    def wait(self, seconds: float | None = None) -> int | None:
        """Wait until the runtime ends by itself; None when `seconds` pass before."""
        return self._child.wait(seconds)

    def crash(self, when: str) -> ServeError:
        """The error that says how the runtime ended, with its last lines and what is known of the cause."""
        self._child.wait(2)
        code = self._child.exit_code() or 0
        cause, hint = diagnose(self._child.tail, code)
        signal = f"signal {code - 128}" if code > 128 else f"exit code {code}"
        return ServeError(f"{self.title} ended {when} ({signal}): {cause}.{quote(self._child.tail)}", hint=hint)

    def stop(self, drain: float) -> int:
        """Let it finish what it is answering, `drain` seconds at most; no process of it is left then."""
        return self._child.stop(drain)

    def memory(self) -> int:
        """Bytes that it and all that it started hold in RAM now, without what they share."""
        total = 0
        for process in self._child.processes():
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss - getattr(process.memory_info(), "shared", 0)
        return total

    def resident(self) -> int:
        """Bytes in RAM now, mapped files included (llama.cpp maps its weights)."""
        total = 0
        for process in self._child.processes():
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
        return total

    def pids(self) -> list[int]:
        """Of the runtime and all that it started."""
        return [process.pid for process in self._child.processes()]


def free_port(host: str) -> int:
    """A port that nobody listens on."""
    with socket.socket(_family(host)) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def require_free(host: str, port: int) -> None:
    """Raises ServeError when the address cannot be listened on."""
    try:
        with socket.socket(_family(host)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise ServeError(
            f"port {port} of {host} cannot be used: {error.strerror or error}",
            hint="--port 0 picks a free one; lowbit ps shows the servers that run",
        ) from error


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
