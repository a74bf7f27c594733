"""What of this machine a process may use: processor affinity and control groups (v2, or v1).

Sources: Linux, Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst; cpu.cfs_quota_us in
Documentation/scheduler/sched-bwc.rst.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import psutil

_ROOT = Path("/sys/fs/cgroup")
# cgroup v1 writes a number near 2**63 where there is no limit
_UNLIMITED = 2**60


def usable_cores(root: Path = _ROOT) -> int:
    """Cores that this process may keep busy at once, at least 1; of a part of a core no thread is made."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, int(min([float(cores), *_quotas(root)])))


def usable_memory(root: Path = _ROOT) -> int:
    """Bytes of memory of this machine, or of its container."""
    return min([int(psutil.virtual_memory().total), *(limit for limit, _ in _memory(root))])


def free_memory(root: Path = _ROOT) -> int:
    """Bytes that can be taken now without swapping, within the limits."""
    left = [limit - used for limit, used in _memory(root)]
    return max(0, min([int(psutil.virtual_memory().available), *left]))


def _quotas(root: Path) -> list[float]:
    found = [_text(folder / "cpu.max").split() for folder in _folders(root)]
    found.append([_text(root / "cpu/cpu.cfs_quota_us"), _text(root / "cpu/cpu.cfs_period_us")])
    return [int(pair[0]) / int(pair[1]) for pair in found if len(pair) == 2 and all(each.isdigit() for each in pair)]


def _memory(root: Path) -> list[tuple[int, int]]:
    """(limit, what is used of it) of every group that has a limit."""
    groups = [(folder, "memory.max", "memory.current", "inactive_file ") for folder in _folders(root)]
    groups.append((root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "))
    found = []
    for folder, limit, used, cached in groups:
        most, taken = _text(folder / limit), _text(folder / used)
        if most.isdigit() and int(most) < _UNLIMITED:
            # the page cache counts as used there, but is given up when memory is asked for
            lines = _text(folder / "memory.stat").splitlines()
            cache = sum(int(line.split()[1]) for line in lines if line.startswith(cached))
            found.append((int(most), max(0, int(taken or 0) - cache)))
    return found


def _folders(root: Path) -> list[Path]:
    """This process's control group (v2) and those above it."""
    own = next((line[3:] for line in _text(Path("/proc/self/cgroup")).splitlines() if line.startswith("0::")), "/")
    folder = root / own.strip().lstrip("/")
    return [path for path in (folder, *folder.parents) if path == root or root in path.parents]


def _text(file: Path) -> str:
    with contextlib.suppress(OSError):
        return file.read_text().strip()
    return ""
