"""Stands between lowbit and a runtime, so that a runtime never outlives lowbit, however lowbit ends.

    python guard.py PIPE -- COMMAND...

PIPE is the read end of a pipe whose other end only lowbit holds: when lowbit is gone, even by kill -9, reading it ends,
and the runtime is stopped with all processes it started. On Linux the kernel also kills the runtime when the guard is
killed (PR_SET_PDEATHSIG). SIGTERM is handed on to the runtime. The guard exits with the runtime's exit code, 128 plus
its number for a signal. Only the standard library is imported: it starts in milliseconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time

ORPHAN_SECONDS = 5.0
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Entry point."""
    pipe, command = int(sys.argv[1]), sys.argv[3:]
    try:
        # in a group of its own: its helpers can then be stopped with it, and the guard lives to tell
        runtime = subprocess.Popen(command, process_group=0, preexec_fn=_die_with_parent)
    except OSError as error:
        sys.exit(f"{command[0]} cannot be started: {error.strerror}")
    signal.signal(signal.SIGTERM, lambda *_: _send(runtime.pid, signal.SIGTERM))
    threading.Thread(target=_watch, args=(pipe, runtime), daemon=True).start()
    code = runtime.wait()
    _kill_group(runtime.pid)
    sys.exit(code if code >= 0 else 128 - code)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _watch(pipe: int, runtime: subprocess.Popen[bytes]) -> None:
    while os.read(pipe, 1):
        pass
    _send(runtime.pid, signal.SIGTERM)
    time.sleep(ORPHAN_SECONDS)
    _kill_group(runtime.pid)


def _send(process: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    main()
