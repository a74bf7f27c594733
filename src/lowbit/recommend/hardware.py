"""Hardware by name: a table of GPUs, CPUs and boards, and the short words for what is not in it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any, Literal

import yaml

from lowbit.core.errors import RecipeError, did_you_mean

Kind = Literal["gpu", "apple", "cpu", "board"]
_OTHER_WORDS = "cpu:8c,32g; gpu:24g,cc8.9,1000gbs; board:4g; a name with a count (rtx4090x2); or auto"
# dual-channel DDR4-3200; a channel more for every 16 cores beyond
_CPU_BANDWIDTH, _BOARD_BANDWIDTH, _GPU_BANDWIDTH = 51.2, 12.8, 400.0
_TFLOPS_PER_CORE = 0.08


@dataclass(frozen=True)
class Hardware:
    """Where a model is to run: `devices` alike.

    id: as it is named on the command line. memory: bytes of one device that can be used. bandwidth: bytes a second of its
    memory; flops: 16-bit matrix operations a second. cc: NVIDIA's compute capability, 0 for others. features: instruction
    sets (avx2, avx512, vnni, bf16, amx, neon) and number types (fp8, mxfp4). source: where the numbers come from.
    measured: bandwidth and flops were measured here and now.
    """

    id: str
    name: str
    kind: Kind
    memory: int
    bandwidth: float
    flops: float
    vendor: str = ""
    cc: float = 0.0
    tier: str = ""
    cores: int = 0
    features: tuple[str, ...] = ()
    source: str = ""
    devices: int = 1
    measured: bool = False

    @property
    def total_memory(self) -> int:
        """Bytes of all devices."""
        return self.memory * self.devices

    @property
    def place(self) -> Literal["gpu", "cpu"]:
        """Which of a runtime's two kinds of memory serving takes; Apple's GPU counts as one."""
        return "gpu" if self.kind in ("gpu", "apple") else "cpu"


def parse_hardware(text: str) -> Hardware:
    """ "rtx4090", "h100x2", "2xh100", "cpu:8c,32g", "gpu:24g,cc8.9", "board:4g". Raises RecipeError that names the nearest.

    "auto" is `lowbit.recommend.detect.detect`.
    """
    kind, colon, rest = text.strip().lower().partition(":")
    if colon:
        return _described(kind, rest, text)
    name = _plain(text)
    found = _named(name)
    counted = re.fullmatch(r"(\d+)x(.+)|(.+?)x(\d+)", name)
    if found is None and counted is not None:
        # mi300x8 is eight MI300X, not eight of something called MI300
        base, count = counted[2] or counted[3], int(counted[1] or counted[4])
        found = _named(base) or _named(f"{base}x")
        if found is not None and 1 <= count <= 1024:
            return replace(found, devices=count, id=f"{found.id}x{count}" if count > 1 else found.id)
        found = None
    if found is None:
        raise RecipeError(
            f"hardware {text!r} is not in the table{did_you_mean(name, table())}", hint=f"also: {_OTHER_WORDS}"
        )
    return found


@cache
def table() -> dict[str, Hardware]:
    """All hardware that can be named, by id."""
    content = yaml.safe_load(resources.files("lowbit.recommend").joinpath("hardware.yaml").read_text())
    return {key: _entry(key, entry, content["sources"]) for key, entry in content["hardware"].items()}


def by_device_name(name: str) -> Hardware | None:
    """The row that fits a driver's name for a device ("NVIDIA H100 80GB HBM3", "NVIDIA GeForce RTX 4090")."""
    told = _plain(re.sub(r"nvidia|geforce|tesla|amd|instinct|radeon|laptop gpu", "", name.lower()))
    fitting = [row for key, row in table().items() if row.kind == "gpu" and told.startswith(_plain(key.split("-")[0]))]
    return max(fitting, key=lambda row: len(_plain(row.id.split("-")[0])), default=None)


def _entry(key: str, entry: Mapping[str, Any], sources: Mapping[str, str]) -> Hardware:
    kind: Kind = entry.get("kind", "gpu")
    cc = float(entry.get("cc", 0))
    vendor = "apple" if kind == "apple" else entry.get("vendor", "nvidia" if cc or kind == "gpu" else "")
    return Hardware(
        id=key,
        name=entry["name"],
        kind=kind,
        memory=int(entry["memory"] * 2**30),
        bandwidth=entry["bandwidth"] * 1e9,
        flops=entry["tflops"] * 1e12,
        vendor=vendor,
        cc=cc,
        tier=entry.get("tier", ""),
        cores=entry.get("cores", 0),
        features=tuple(entry.get("features", ())),
        source=sources[entry["source"]],
    )


def _named(name: str) -> Hardware | None:
    return next((row for key, row in table().items() if _plain(key) == name or _plain(row.name) == name), None)


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def _described(kind: str, rest: str, text: str) -> Hardware:
    """Hardware in words: memory in g, cores in c, bandwidth in gbs, compute capability, instruction sets."""
    if kind not in ("cpu", "gpu", "board"):
        raise RecipeError(f"hardware {text!r} begins with an unknown word", hint=f"one of: {_OTHER_WORDS}")
    numbers: dict[str, float] = {}
    features = []
    for part in (part.strip() for part in rest.split(",") if part.strip()):
        number = re.fullmatch(r"(cc)?(\d+(?:\.\d+)?)(c|gbs|gb|gib|g)?", part)
        if number is None:
            features.append(part)
            continue
        unit = "cc" if number[1] else "g" if number[3] in ("g", "gb", "gib") else str(number[3])
        numbers[unit] = float(number[2])
    known = ("avx2", "avx512", "vnni", "bf16", "amx", "neon", "fp8", "mxfp4", "amd", "intel")
    wrong = next((feature for feature in features if feature not in known), None)
    if wrong is not None or "g" not in numbers or "None" in numbers:
        raise RecipeError(
            f"hardware {text!r}: " + (f"{wrong!r} is not understood" if wrong else "it says no memory"),
            hint=f"such as {_OTHER_WORDS}",
        )
    vendor = next((feature for feature in features if feature in ("amd", "intel")), "nvidia" if kind == "gpu" else "")
    cores = int(numbers.get("c", 4 if kind == "board" else 8))
    bandwidth = {"cpu": _CPU_BANDWIDTH * max(1, cores // 16), "board": _BOARD_BANDWIDTH, "gpu": _GPU_BANDWIDTH}[kind]
    rate = 20 * numbers.get("gbs", _GPU_BANDWIDTH) / 200 if kind == "gpu" else cores * _TFLOPS_PER_CORE
    return Hardware(
        id=text.strip().lower(),
        name=text.strip(),
        kind="gpu" if kind == "gpu" else "board" if kind == "board" else "cpu",
        memory=int(numbers["g"] * 2**30),
        bandwidth=numbers.get("gbs", bandwidth) * 1e9,
        flops=rate * 1e12,
        vendor=vendor,
        cc=numbers.get("cc", 8.0 if vendor == "nvidia" else 0.0),
        tier="consumer" if kind == "gpu" and numbers["g"] < 40 else "datacenter" if kind == "gpu" else "",
        cores=0 if kind == "gpu" else cores,
        features=tuple(feature for feature in features if feature not in ("amd", "intel")),
        source="as described; bandwidth assumed" if "gbs" not in numbers else "as described",
    )
