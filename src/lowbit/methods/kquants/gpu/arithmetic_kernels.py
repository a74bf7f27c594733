"""Sums in order and rounding onto a grid as GPU kernels, where PyTorch goes over all weights many times.

The results are exactly those of arithmetic.sequential_sum and grid.round_uniform; __init__.py says how.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# one lane a thread: what a lane stores it may read again
LANES, WARPS = 128, 4
_WEIGHTS = 1024


@triton.jit
def nearest_int(value):
    """arithmetic.nearest_int: to even in range, the low bits of the float beyond, 0 for NaN."""
    bits = (value + 12582912.0).to(tl.int32, bitcast=True)
    return tl.where(value != value, 0, (bits & 0x007FFFFF) - 0x00400000)


@triton.jit
def clamped(value, LOW: tl.constexpr, HIGH: tl.constexpr):
    """nearest_int within bounds, as float32."""
    return tl.minimum(tl.maximum(nearest_int(value), LOW), HIGH).to(tl.float32)


@triton.jit
def _sum(rows, sums, count, n, LANES: tl.constexpr):
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    inside = lane < count
    total = tl.zeros((LANES,), dtype=tl.float32)
    for _ in range(n):
        total += tl.load(rows + lane, mask=inside, other=0.0)
        rows += count
    tl.store(sums + lane, total, mask=inside)


@triton.jit
def _round(
    weights, scales, minimums, codes, count,
    LOW: tl.constexpr, HIGH: tl.constexpr, SHIFTED: tl.constexpr, N: tl.constexpr, WEIGHTS: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * WEIGHTS + tl.arange(0, WEIGHTS)
    inside = place < count
    value = tl.load(weights + place, mask=inside, other=0.0)
    scale = tl.load(scales + place // N, mask=inside, other=0.0)
    if SHIFTED:
        value += tl.load(minimums + place // N, mask=inside, other=0.0)
    value = tl.where(scale == 0, 0.0, tl.div_rn(value, tl.where(scale == 0, 1.0, scale)))
    code = tl.minimum(tl.maximum(nearest_int(value), LOW), HIGH) - LOW
    tl.store(codes + place, code.to(tl.uint8), mask=inside)


def sequential_sum(rows: Tensor) -> Tensor:
    """arithmetic.sequential_sum of float32 rows [n, ...]."""
    sums = torch.empty(rows.shape[1:], device=rows.device)
    _sum[(triton.cdiv(sums.numel(), LANES),)](
        rows.contiguous(), sums, sums.numel(), len(rows), LANES=LANES, num_warps=WARPS, enable_fp_fusion=False
    )
    return sums


def round_uniform(weights: Tensor, scale: Tensor, minimum: Tensor | None, low: int, high: int) -> Tensor:
    """grid.round_uniform given scale and minimum [rows, cols / sub_block] float32: codes uint8 [rows, cols]."""
    codes = torch.empty(weights.shape, dtype=torch.uint8, device=weights.device)
    _round[(triton.cdiv(codes.numel(), _WEIGHTS),)](
        weights.contiguous(), scale.contiguous(), scale if minimum is None else minimum.contiguous(), codes,
        codes.numel(), LOW=low, HIGH=high, SHIFTED=minimum is not None, N=weights.numel() // scale.numel(),
        WEIGHTS=_WEIGHTS, num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return codes
