"""The machine this runs on: GPUs from NVML or torch, else processors and memory as the container may use them, with memory
bandwidth and matrix rate measured in about a second."""

from __future__ import annotations

import contextlib
import importlib
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

from lowbit.core.container import usable_cores, usable_memory
from lowbit.core.hardware import matrix_rate, read_bandwidth
from lowbit.recommend.hardware import Hardware, by_device_name

# flags of /proc/cpuinfo ("flags" on x86, "Features" on ARM) -> what runtimes ask for
_FLAGS = {"avx2": "avx2", "avx512f": "avx512", "avx512_vnni": "vnni", "avx_vnni": "vnni", "avx512_bf16": "bf16",
          "amx_tile": "amx", "asimd": "neon", "bf16": "bf16"}  # fmt: skip
_BOARD_MEMORY = 8 * 2**30


def detect() -> Hardware:
    """The GPUs of this machine if it has any that NVML or torch sees, else its CPU."""
    return _gpus() or _cpu()


def cpu_features(cpuinfo: str) -> tuple[str, ...]:
    """Instruction sets that matter to kernels, from the text of /proc/cpuinfo."""
    words = {
        word
        for line in cpuinfo.splitlines()
        if line.partition(":")[0].strip() in ("flags", "Features")
        for word in line.partition(":")[2].split()
    }
    return tuple(dict.fromkeys(feature for flag, feature in _FLAGS.items() if flag in words))


def _cpu() -> Hardware:
    cores, memory = usable_cores(), usable_memory()
    cpuinfo = ""
    with contextlib.suppress(OSError):
        cpuinfo = Path("/proc/cpuinfo").read_text()
    names = [line.partition(":")[2].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    return Hardware(
        id=f"cpu:{cores}c,{memory / 2**30:.0f}g",
        name=f"{names[0] if names else platform.machine()}, {cores} cores",
        kind="board" if memory < _BOARD_MEMORY else "cpu",
        memory=memory,
        bandwidth=read_bandwidth(),
        flops=matrix_rate(),
        cores=cores,
        features=cpu_features(cpuinfo),
        source="measured on this machine",
        measured=True,
    )


def _gpus() -> Hardware | None:
    found = _nvml() or _torch()
    if not found:
        return None
    name, memory, cc = min(found, key=lambda gpu: gpu[1])
    known = by_device_name(name)
    count = len(found)
    if known is None:
        return Hardware(name.lower().replace(" ", "-"), name, "gpu", memory, 400e9, 40e12, "nvidia", cc, "consumer",
                        source="this machine's driver; bandwidth assumed", devices=count)  # fmt: skip
    return replace(known, memory=memory, cc=cc, devices=count, id=f"{known.id}x{count}" if count > 1 else known.id)


def _nvml() -> list[tuple[str, int, float]]:
    """(name, bytes, compute capability) of each GPU, by NVIDIA's own library where its Python package is installed."""
    try:
        pynvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    found = []
    for index in range(pynvml.nvmlDeviceGetCount()):
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        name = pynvml.nvmlDeviceGetName(handle)
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
        text = name.decode() if isinstance(name, bytes) else str(name)
        found.append((text, int(pynvml.nvmlDeviceGetMemoryInfo(handle).total), major + minor / 10))
    pynvml.nvmlShutdown()
    return found


def _torch() -> list[tuple[str, int, float]]:
    import torch

    if not torch.cuda.is_available():
        return []
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [(device.name, device.total_memory, device.major + device.minor / 10) for device in devices]
