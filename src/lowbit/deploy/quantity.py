"""Kubernetes quantities: "500m", "1.5Gi", "2e9".

Source: Kubernetes, staging/src/k8s.io/apimachinery/pkg/api/resource/quantity.go.
"""

from __future__ import annotations

import math
import re

_UNITS = {"n": 1e-9, "u": 1e-6, "m": 1e-3, "": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18,
          "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40, "Pi": 2.0**50, "Ei": 2.0**60}  # fmt: skip
_QUANTITY = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+))(?:([eE][+-]?\d+)|([numkMGTPE]|[KMGTPE]i)?)")
GIB = 2**30


def parse_quantity(value: object) -> float | None:
    """Its number, of bytes or cores; None for what is no quantity ("32 GB", "8GB")."""
    match = _QUANTITY.fullmatch(str(value))
    if match is None or isinstance(value, bool):
        return None
    return float(match[1] + (match[2] or "")) * _UNITS[match[3] or ""]


def gibibytes(nbytes: float, step: int = 1) -> str:
    """Bytes, rounded up to whole multiples of `step` GiB: "12Gi"."""
    return f"{max(step, math.ceil(nbytes / GIB / step) * step)}Gi"


def repaired(value: object) -> str | None:
    """What was meant by what is no quantity: "32 GB" -> "32G", "16 gi" -> "16Gi"; None where that is anyone's guess."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgtKMGT])(i?)[bB]?\s*", str(value))
    if match is None:
        return None
    unit = match[2].upper() if match[3] or match[2].upper() != "K" else "k"
    return f"{match[1]}{unit}{match[3]}"
