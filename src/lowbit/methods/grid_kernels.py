"""The grid search of lowbit.core.primitives as one GPU kernel: all candidates of a group while it lies in registers.

In PyTorch each of the 24 candidates reads and writes the whole matrix about a dozen times. The results are those of
`search_grid` but for float32 rounding of sums over a group.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from lowbit.core.primitives import REFINEMENTS, SHRINK, Grid
from lowbit.core.scheme import WeightScheme

# weights that a program holds at a time
_HELD = 512


@triton.jit
def _as_stored(scale, KIND: tl.constexpr, TINY: tl.constexpr, LARGEST: tl.constexpr):
    magnitude = tl.minimum(tl.maximum(tl.abs(scale), TINY), LARGEST)
    signed = tl.where(scale < 0, -magnitude, magnitude)
    if KIND == 1:
        return signed.to(tl.float16).to(tl.float32)
    elif KIND == 2:
        return signed.to(tl.bfloat16).to(tl.float32)
    else:
        return signed


@triton.jit
def _search(
    weight, cost, shrinks, scales, zeros, count, groups, size, max_code, middle,
    SYMMETRIC: tl.constexpr, SHRINKS: tl.constexpr, ROUNDS: tl.constexpr,
    KIND: tl.constexpr, TINY: tl.constexpr, LARGEST: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column = tl.arange(0, N)
    inside = (group < count)[:, None] & (column < size)[None, :]
    w = tl.load(weight + group[:, None] * size + column[None, :], mask=inside, other=0.0)
    c = tl.load(cost + (group % groups)[:, None] * size + column[None, :], mask=inside, other=0.0)
    # padding is zero, which lies within every range that is clamped to hold zero
    low, high = tl.minimum(tl.min(w, axis=1), 0.0), tl.maximum(tl.max(w, axis=1), 0.0)
    best_error = tl.full((R,), float("inf"), dtype=tl.float32)
    best_scale = tl.full((R,), 1.0, dtype=tl.float32)
    best_zero = tl.zeros((R,), dtype=tl.float32)
    for candidate in range(SHRINKS * (2 if SYMMETRIC else 1)):
        shrink = tl.load(shrinks + candidate % SHRINKS)
        if SYMMETRIC:
            extremum = libdevice.div_rn(tl.where(high > -low, high, low), -middle)
            even = libdevice.div_rn(tl.maximum(high, -low), max_code / 2)
            scale = tl.where(candidate < SHRINKS, extremum, even) * shrink
            zero = tl.zeros((R,), dtype=tl.float32) + middle
        else:
            scale = tl.maximum(libdevice.div_rn((high - low) * shrink, max_code), 1e-30)
            zero = libdevice.rint(libdevice.div_rn(-low * shrink, scale))
            zero = tl.minimum(tl.maximum(zero, 0.0), max_code)
        for _ in range(ROUNDS):
            scale = _as_stored(scale, KIND, TINY, LARGEST)
            code = libdevice.rint(libdevice.div_rn(w, scale[:, None]) + zero[:, None])
            offset = tl.minimum(tl.maximum(code, 0.0), max_code) - zero[:, None]
            weighted = c * offset
            power, match = tl.sum(weighted * offset, axis=1), tl.sum(weighted * w, axis=1)
            error = scale * (scale * power - 2 * match)
            better = error < best_error
            best_error = tl.where(better, error, best_error)
            best_scale = tl.where(better, scale, best_scale)
            best_zero = tl.where(better, zero, best_zero)
            scale = tl.where(power > 0, libdevice.div_rn(match, tl.where(power > 0, power, 1.0)), scale)
    tl.store(scales + group, best_scale, mask=group < count)
    tl.store(zeros + group, best_zero, mask=group < count)


def search_grid(weight: Tensor, scheme: WeightScheme, scale_dtype: torch.dtype, importance: Tensor) -> Grid:
    """weight [out, in] float32 on a GPU, importance [in]: the grid that primitives.search_grid looks for; groups of at most
    1,024 columns."""
    rows, columns = weight.shape
    size = scheme.columns_per_scale(columns)
    groups = columns // size
    scales = torch.empty(rows, groups, device=weight.device)
    zeros = torch.empty_like(scales)
    width = triton.next_power_of_2(size)
    at_once = max(1, _HELD // width)
    limits = torch.finfo(scale_dtype)
    _search[(triton.cdiv(rows * groups, at_once),)](
        weight.contiguous(),
        importance.float().contiguous(),
        torch.tensor(SHRINK, device=weight.device),
        scales,
        zeros,
        rows * groups,
        groups,
        size,
        float(scheme.max_code),
        float(scheme.middle),
        SYMMETRIC=scheme.symmetric,
        SHRINKS=len(SHRINK),
        ROUNDS=REFINEMENTS,
        KIND={torch.float16: 1, torch.bfloat16: 2}.get(scale_dtype, 0),
        TINY=limits.tiny,
        LARGEST=limits.max,
        R=at_once,
        N=width,
        num_warps=4,
    )
    return Grid(scales, zeros)
