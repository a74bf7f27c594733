"""Float32 arithmetic exactly as the C of ggml does it, on whole vectors of blocks.

Everything here is written so that each float32 operation is rounded on its own, in the order of the C source:
no fused multiply-add, no reciprocal in place of a division, sums strictly from the first element to the last.
Tensors are "element-major": `[elements of a block, blocks]`, so one step of a C loop over the elements of a block
is one vector operation over all blocks.
Source: llama.cpp, ggml/src/ggml-quants.c (built without fused multiply-add, as the ggml-base library is).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit.methods.kquants.loops import gpu_for

NEAREST_INT_LIMIT = 4194303.0


def ratio(numerator: float, denominator: Tensor) -> Tensor:
    """`numerator / denominator`, correctly rounded (`number / tensor` in torch is a reciprocal times a number)."""
    return torch.full_like(denominator, numerator).div_(denominator)


def divide(numerator: Tensor, denominator: float) -> Tensor:
    """`numerator / denominator`, correctly rounded (CUDA multiplies by the reciprocal of a Python number)."""
    return numerator / torch.full_like(numerator, denominator)


def exact_sqrt_(values: Tensor) -> Tensor:
    """In place square root, correctly rounded: torch's own is up to one unit off on CPUs (it calls MKL), not on GPUs.

    The square root of a float32 is never close enough to a rounding boundary for the way over float64 to matter.
    """
    if values.is_cuda:
        return values.sqrt_()
    for piece in torch.split(values.view(-1), 1 << 16):
        piece.copy_(piece.to(torch.float64).sqrt_())
    return values


def nearest_int(values: Tensor) -> Tensor:
    """ggml's `nearest_int` as int32, including what it makes of values out of its range (|v| > 4194303, inf, NaN).

    In range it rounds half to even. Out of range it keeps the low bits of the float, and files depend on them.
    """
    bits = (values + 12582912.0).view(torch.int32)
    rounded = (bits & 0x007FFFFF) - 0x00400000
    return rounded.masked_fill_(values.isnan(), 0)


def round_clamped_(values: Tensor, low: float, high: float, *, in_range: bool | None = None) -> Tensor:
    """In place `clamp(nearest_int(values), low, high)` in float32; `in_range` says that no value needs the slow way."""
    if in_range is None:
        in_range = within_nearest_int(values)
    if in_range:
        return values.round_().clamp_(low, high)
    return values.copy_(nearest_int(values)).clamp_(low, high)


def within_nearest_int(values: Tensor) -> bool:
    """Whether plain rounding gives what `nearest_int` gives, for every value."""
    if values.numel() == 0:
        return True
    low, high = torch.aminmax(values)
    return bool((low >= -NEAREST_INT_LIMIT) & (high <= NEAREST_INT_LIMIT))


def sequential_sum(rows: Tensor | Sequence[Tensor]) -> Tensor:
    """Sum over the first dimension, strictly from first to last, starting from +0.

    Give `rows.unbind(0)` to sum the same buffer many times.
    """
    if isinstance(rows, Tensor):
        gpu = gpu_for(rows)
        if gpu is not None:
            sums: Tensor = gpu.sequential_sum(rows)
            return sums
    parts = rows.unbind(0) if isinstance(rows, Tensor) else rows
    total = parts[0] + 0.0
    for row in parts[1:]:
        total.add_(row)
    return total


def signed_extreme(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Over the first dimension: the largest absolute value, and the first element that has it (0 if all are zero)."""
    largest = torch.zeros_like(rows[0])
    signed = torch.zeros_like(rows[0])
    for row, size in zip(rows.unbind(0), rows.abs().unbind(0), strict=True):
        larger = size > largest  # false for NaN, which torch.maximum would keep
        signed = torch.where(larger, row, signed)
        largest = torch.where(larger, size, largest)
    return largest, signed


def first_min_max(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum and maximum over the first dimension; of equal values (+0, -0) the first."""
    low = high = rows[0]
    for row in rows.unbind(0)[1:]:
        low = torch.where(row < low, row, low)
        high = torch.where(row > high, row, high)
    return low, high


def to_half(values: Tensor) -> Tensor:
    """float32 to float16, round half to even, overflow to infinity: what GGML_FP32_TO_FP16 gives."""
    return values.to(torch.float16)


def wrap_uint8(values: Tensor) -> Tensor:
    """int32 values as the C cast to uint8_t leaves them, still int32."""
    return values & 0xFF


def wrap_int8(values: Tensor) -> Tensor:
    """int32 values as the C cast to int8_t leaves them, still int32."""
    return ((values + 128) & 0xFF) - 128
