"""Energy that processors and GPUs say they used, where the machine lets it be read."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

_RAPL = Path("/sys/class/powercap")


class EnergyMeter:
    """Joules since it was made, of all CPU packages (Intel and AMD RAPL) and NVIDIA GPUs that can be read.

    source: which they are; "" where nothing can be read. The counters are the whole machine's, not one process's.
    """

    def __init__(self, rapl: Path = _RAPL) -> None:
        self._packages = [zone for zone in sorted(rapl.glob("intel-rapl:*")) if zone.name.count(":") == 1]
        self._packages = [zone for zone in self._packages if _number(zone / "energy_uj") is not None]
        self._nvml, self._gpus = _nvml()
        self.source = " and ".join([*(["CPU packages"] if self._packages else []), *(["GPUs"] if self._gpus else [])])
        self._start = self._counts()

    def joules(self) -> float | None:
        """None where nothing can be read."""
        if not self.source:
            return None
        now = self._counts()
        used = 0.0
        for zone, before, after in zip(self._packages, self._start[0], now[0], strict=True):
            wrapped = (_number(zone / "max_energy_range_uj") or 0) if after < before else 0
            used += (after - before + wrapped) / 1e6
        return used + sum(after - before for before, after in zip(self._start[1], now[1], strict=True)) / 1e3

    def _counts(self) -> tuple[list[int], list[int]]:
        """Microjoules of the packages, millijoules of the GPUs."""
        packages = [_number(zone / "energy_uj") or 0 for zone in self._packages]
        return packages, [int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(gpu)) for gpu in self._gpus]


def _number(file: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return int(file.read_text())
    return None


def _nvml() -> tuple[Any, list[Any]]:
    """NVIDIA's library and the GPUs that count their energy (Volta and later)."""
    try:
        import pynvml
    except ImportError:
        return None, []
    found = []
    try:
        pynvml.nvmlInit()
        for index in range(pynvml.nvmlDeviceGetCount()):
            gpu = pynvml.nvmlDeviceGetHandleByIndex(index)
            pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu)
            found.append(gpu)
    except pynvml.NVMLError:
        return pynvml, found
    return pynvml, found
