"""What this machine can give a runtime: cores and memory within the limits of its container, and NVIDIA GPUs."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from dataclasses import dataclass

import psutil

from lowbit.core.container import free_memory, usable_cores


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
    return Machine(usable_cores(), free_memory(), tuple(nvidia_gpus()))


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
