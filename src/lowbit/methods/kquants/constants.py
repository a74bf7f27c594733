"""The constants of ggml's searches. Source: llama.cpp, ggml/src/ggml-quants.c."""

from __future__ import annotations

import struct
from dataclasses import dataclass

GROUP_MAX_EPS = 1e-15


def f32(value: float) -> float:
    """`value` rounded to float32: C constants such as 0.1f."""
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded


@dataclass(frozen=True)
class AffineSearch:
    """Those of one make_qkx*_quants call: `steps + 1` trials of `(start + delta*i + top) / range`."""

    top: int
    start: float
    delta: float
    steps: int
    absolute_error: bool = False

    def numerators(self) -> list[float]:
        return [f32(f32(f32(self.start) + f32(f32(self.delta) * i)) + self.top) for i in range(self.steps + 1)]
