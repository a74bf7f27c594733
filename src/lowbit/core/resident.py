"""Memory of this process: the most that it has held, and giving back what it has freed.

Without a heavy import: child processes that are measured use it too.
"""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
from pathlib import Path


def peak_resident() -> int:
    """Bytes. On Linux VmHWM: ru_maxrss starts at what the parent held when it started this process (exec_mmap in fs/exec.c),
    so that a small child of a large program would be told its parent's size."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def give_back() -> None:
    """Return freed memory to the system. glibc keeps it, in pieces between what is in use, so that a process that works block
    by block grows although it holds no more (malloc_trim(3)); takes milliseconds, and nothing happens where it is not known."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
