"""Where to compute and in what dtype; how much memory was used."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import torch

from lowbit.core.container import free_memory
from lowbit.core.errors import RecipeError
from lowbit.core.resident import peak_resident


def pick_device(name: str = "auto") -> torch.device:
    """ "auto" is the first GPU, else the CPU. Raises RecipeError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(f"device {name!r} is not available here", hint="--device auto, cpu or cuda:0") from error
    return device


def calibration_dtype(device: torch.device, stored: torch.dtype) -> torch.dtype:
    """What activations are computed in while calibrating: 16 bits where matrix units exist for them, else float32."""
    if device.type == "cuda":
        return stored if stored in (torch.float16, torch.bfloat16) else torch.bfloat16
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def free_memory_on(device: torch.device) -> int:
    """Bytes that can be taken now: of a GPU, or of this machine within its container's limits."""
    if device.type != "cuda":
        return free_memory()
    # PyTorch keeps what was freed, and gives it to whoever asks next
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + kept


def memory_of(device: torch.device) -> int:
    """Bytes that a GPU has, used or not."""
    return int(torch.cuda.get_device_properties(device).total_memory)


def reset_peak_memory(device: torch.device) -> None:
    """Begin to watch afresh, so that the peak is that of what comes now (Linux; elsewhere it is the process's)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_mib(device: torch.device) -> dict[str, float]:
    """Peak resident memory of this process and, on a GPU, peak allocated memory, in MiB, since `reset_peak_memory`."""
    peak = {"resident": peak_resident() / 2**20}
    if device.type == "cuda":
        peak["gpu"] = torch.cuda.max_memory_allocated(device) / 2**20
    return peak


def matrix_rate(device: torch.device | None = None, dtype: torch.dtype = torch.float32, seconds: float = 0.25) -> float:
    """Operations a second of a matrix product on this machine, now."""
    left = torch.randn(1024, 1024, device=device, dtype=dtype)
    left @ left
    started, rounds = time.perf_counter(), 0
    while (passed := time.perf_counter() - started) < seconds or rounds == 0:
        (left @ left)[0, 0].item()
        rounds += 1
    return rounds * 2 * 1024**3 / passed


def read_bandwidth(seconds: float = 0.5, nbytes: int = 256 * 2**20) -> float:
    """Bytes a second that this machine's processors read from memory together, now: the best of passes over a buffer that
    no cache holds."""
    data = torch.ones(nbytes // 4, dtype=torch.float32)
    best, begin = float("inf"), time.perf_counter()
    while time.perf_counter() - begin < seconds:
        started = time.perf_counter()
        data.sum().item()
        best = min(best, time.perf_counter() - started)
    return nbytes / best
