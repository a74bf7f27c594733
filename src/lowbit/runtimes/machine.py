"""What this machine can give a runtime: cores and memory within the limits of its container, and NVIDIA GPUs."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Gpu:
    """capability: CUDA compute capability times ten. memory, free: bytes."""

    name: str
    capability: int
    memory: int
    free: int


@dataclass(frozen=True)
class Machine:
    """cores: what may really be used at once. memory: bytes that can be taken now."""

    cores: int
    memory: int
    gpus: tuple[Gpu, ...] = ()

    @property
    def what(self) -> str:
        """For people: "2 x NVIDIA L4" or "8 CPU cores"."""
        if self.gpus:
            count = f"{len(self.gpus)} x " if len(self.gpus) > 1 else ""
            return f"{count}{self.gpus[0].name}"
        return f"{self.cores} CPU core{'s' if self.cores > 1 else ''}"


def this_machine() -> Machine:
    """The machine that this process runs on."""
    return Machine(available_cores(), available_memory(), tuple(nvidia_gpus()))


def available_cores(root: Path = _CGROUP) -> int:
    """Cores that this process may run on, within the quota of its control groups (v2 or v1), at least 1."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    for folder in _folders(root):
        quota, _, period = _text(folder / "cpu.max").partition(" ")
        if quota.isdigit() and period.isdigit():
            cores = min(cores, -(-int(quota) // int(period)))
    quota, period = _text(root / "cpu/cpu.cfs_quota_us"), _text(root / "cpu/cpu.cfs_period_us")
    if quota.isdigit() and period.isdigit():
        cores = min(cores, -(-int(quota) // int(period)))
    return max(cores, 1)


def available_memory(root: Path = _CGROUP) -> int:
    """Bytes that can be taken without swapping, within the limits of the control groups."""
    free = int(psutil.virtual_memory().available)
    for folder in _folders(root):
        limit, used = _text(folder / "memory.max"), _text(folder / "memory.current")
        if limit.isdigit() and used.isdigit():
            # the page cache counts as used there, but is given up when memory is asked for
            cache = next((line.split()[1] for line in _text(folder / "memory.stat").splitlines()
                          if line.startswith("inactive_file ")), "0")  # fmt: skip
            free = min(free, int(limit) - int(used) + int(cache))
    return max(free, 0)


def nvidia_gpus() -> list[Gpu]:
    """As nvidia-smi lists them; empty where there is none, or no driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    fields = "name,compute_cap,memory.total,memory.free"
    try:
        listed = subprocess.run(
            [program, f"--query-gpu={fields}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    found = []
    for line in (line for line in listed.splitlines() if line.count(",") >= 3):
        name, capability, memory, free = (part.strip() for part in line.rsplit(",", 3))
        # a GPU that shares the processor's memory (GB10) tells of none
        shared = None if memory.isdigit() and free.isdigit() else psutil.virtual_memory()
        total = int(memory) << 20 if shared is None else int(shared.total)
        left = int(free) << 20 if shared is None else int(shared.available)
        with contextlib.suppress(ValueError):
            found.append(Gpu(name, round(float(capability) * 10), total, left))
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
