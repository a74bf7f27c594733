"""symmetric.py's searches, make_qx_quants and make_q3_quants, and that of iq4.py; one launch each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.methods.kquants.constants import GROUP_MAX_EPS
from lowbit.methods.kquants.gpu.arithmetic_kernels import LANES, WARPS, clamped


@triton.jit
def _rounded(value, HALF: tl.constexpr):
    # for values in range, which lets NaN through as torch does; a float32 this large has no room for fractions
    whole = (value + 12582912.0) - 12582912.0
    whole = tl.where(whole < -HALF, -HALF * 1.0, whole)
    return tl.where(whole > HALF - 1, (HALF - 1) * 1.0, whole)


@triton.jit
def _extreme(x, lane, inside, count, N: tl.constexpr, LANES: tl.constexpr):
    largest = tl.zeros((LANES,), dtype=tl.float32)
    signed = tl.zeros((LANES,), dtype=tl.float32)
    for j in range(N):
        value = tl.load(x + j * count + lane, mask=inside, other=0.0)
        larger = tl.abs(value) > largest
        signed = tl.where(larger, value, signed)
        largest = tl.where(larger, tl.abs(value), largest)
    return largest, signed


@triton.jit
def _moments(
    x, w, lane, inside, count, inverse, HALF: tl.constexpr, N: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    sum_lx = tl.zeros((LANES,), dtype=tl.float32)
    sum_l2 = tl.zeros((LANES,), dtype=tl.float32)
    for j in range(N):
        value = tl.load(x + j * count + lane, mask=inside, other=0.0)
        weight = tl.load(w + j * count + lane, mask=inside, other=0.0)
        level = _rounded(value * inverse, HALF)
        sum_lx += (weight * value) * level
        sum_l2 += (weight * level) * level
    return sum_lx, sum_l2


@triton.jit
def _symmetric(
    x, w, fits, empties, count, tiny, half, tenth, HALF: tl.constexpr, N: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    inside = lane < count
    zero = tl.zeros((LANES,), dtype=tl.float32)
    size, signed = _extreme(x, lane, inside, count, N, LANES)
    empty = size < tiny
    signed = tl.where(empty, 1.0, signed)
    inverse = tl.div_rn(zero - half, signed)
    sum_lx, sum_l2 = _moments(x, w, lane, inside, count, inverse, HALF, N, LANES)
    # C tests `suml2` for being nonzero here, and for being positive below
    scale = tl.where(sum_l2 != 0, tl.div_rn(sum_lx, sum_l2), 0.0)
    best = scale * sum_lx
    for step in range(-9, 10):
        trial = tl.div_rn(zero - (half + tenth * step), signed)
        sum_lx, sum_l2 = _moments(x, w, lane, inside, count, trial, HALF, N, LANES)
        better = (sum_l2 > 0) & (sum_lx * sum_lx > best * sum_l2) & (step != 0)
        scale = tl.where(better, tl.div_rn(sum_lx, sum_l2), scale)
        best = tl.where(better, scale * sum_lx, best)
        inverse = tl.where(better, trial, inverse)
    tl.store(fits + lane, tl.where(empty, 0.0, scale), mask=inside)
    tl.store(fits + count + lane, inverse, mask=inside)
    tl.store(empties + lane, empty.to(tl.uint8), mask=inside)


@triton.jit
def _descending(
    x, codes, scales, count, tiny, half, HALF: tl.constexpr, N: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    inside = lane < count
    zero = tl.zeros((LANES,), dtype=tl.float32)
    size, signed = _extreme(x, lane, inside, count, N, LANES)
    empty = size < tiny
    inverse = tl.div_rn(zero - half, tl.where(empty, 1.0, signed))
    sum_lx = zero
    sum_l2 = zero
    for j in range(N):
        value = tl.load(x + j * count + lane, mask=inside, other=0.0)
        code = _rounded(value * inverse, HALF)
        weight = value * value
        sum_lx += (weight * value) * code
        sum_l2 += (weight * code) * code
        tl.store(codes + j * count + lane, code, mask=inside)
    # a sub-block of which no code changed in a round does not change in the next one either
    for _ in range(5):
        for j in range(N):
            value = tl.load(x + j * count + lane, mask=inside, other=0.0)
            code = tl.load(codes + j * count + lane, mask=inside, other=0.0)
            square = value * value
            cube = square * value
            rest_lx = sum_lx - cube * code
            rest_l2 = sum_l2 - square * code * code
            new = clamped(tl.div_rn(value * rest_l2, rest_lx), -HALF, HALF - 1)
            new_lx = rest_lx + cube * new
            new_l2 = rest_l2 + square * new * new
            better = new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2
            better = better & (rest_lx > 0) & (new_l2 > 0) & (new != code)
            tl.store(codes + j * count + lane, tl.where(better, new, code), mask=inside)
            sum_lx = tl.where(better, new_lx, sum_lx)
            sum_l2 = tl.where(better, new_l2, sum_l2)
    for j in range(N):
        code = tl.load(codes + j * count + lane, mask=inside, other=0.0)
        tl.store(codes + j * count + lane, tl.where(empty, 0.0, code + half), mask=inside)
    scale = tl.where(sum_l2 > 0, tl.div_rn(sum_lx, sum_l2), 0.0)
    tl.store(scales + lane, tl.where(empty, 0.0, scale), mask=inside)


@triton.jit
def _uneven_level(value):
    # iq4.LEVELS, and the middles between them
    level = tl.where(value >= -115.5, -104.0, -127.0)
    level = tl.where(value >= -93.5, -83.0, level)
    level = tl.where(value >= -74.0, -65.0, level)
    level = tl.where(value >= -57.0, -49.0, level)
    level = tl.where(value >= -42.0, -35.0, level)
    level = tl.where(value >= -28.5, -22.0, level)
    level = tl.where(value >= -16.0, -10.0, level)
    level = tl.where(value >= -4.5, 1.0, level)
    level = tl.where(value >= 7.0, 13.0, level)
    level = tl.where(value >= 19.0, 25.0, level)
    level = tl.where(value >= 31.5, 38.0, level)
    level = tl.where(value >= 45.5, 53.0, level)
    level = tl.where(value >= 61.0, 69.0, level)
    level = tl.where(value >= 79.0, 89.0, level)
    return tl.where(value >= 101.0, 113.0, level)


@triton.jit
def _uneven_moments(x, w, lane, inside, count, inverse, N: tl.constexpr, LANES: tl.constexpr):
    sum_lx = tl.zeros((LANES,), dtype=tl.float32)
    sum_l2 = tl.zeros((LANES,), dtype=tl.float32)
    for j in range(N):
        value = tl.load(x + j * count + lane, mask=inside, other=0.0)
        weight = tl.load(w + j * count + lane, mask=inside, other=0.0)
        level = _uneven_level(value * inverse)
        sum_lx += weight * level * value
        sum_l2 += weight * level * level
    return sum_lx, sum_l2


@triton.jit
def _uneven(x, w, scales, count, tiny, N: tl.constexpr, LANES: tl.constexpr):
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    inside = lane < count
    zero = tl.zeros((LANES,), dtype=tl.float32)
    size, signed = _extreme(x, lane, inside, count, N, LANES)
    empty = size < tiny
    signed = tl.where(empty, 1.0, signed)
    inverse = tl.div_rn(zero + 1.0, tl.div_rn(-signed, zero - 127.0))
    sum_lx, sum_l2 = _uneven_moments(x, w, lane, inside, count, inverse, N, LANES)
    scale = tl.where(sum_l2 > 0, tl.div_rn(sum_lx, sum_l2), 0.0)
    best = scale * sum_lx
    for trial in range(-7, 8):
        inverse = tl.div_rn(zero + (trial - 127.0), signed)
        sum_lx, sum_l2 = _uneven_moments(x, w, lane, inside, count, inverse, N, LANES)
        better = (sum_l2 > 0) & (sum_lx * sum_lx > best * sum_l2)
        scale = tl.where(better, tl.div_rn(sum_lx, sum_l2), scale)
        best = tl.where(better, scale * sum_lx, best)
    tl.store(scales + lane, tl.where(empty, 0.0, scale), mask=inside)


def search_symmetric(x: Tensor, weights: Tensor, half: int) -> tuple[Tensor, Tensor, Tensor]:
    """symmetric.search_symmetric for contiguous x and weights [n, B] float32: the parts of a SymmetricFit, [B] each."""
    n, count = x.shape
    fits = x.new_empty(2, count)
    empty = x.new_empty(count, dtype=torch.uint8)
    _symmetric[(triton.cdiv(count, LANES),)](
        x, weights, fits, empty, count, GROUP_MAX_EPS, float(half), 0.1,
        HALF=half, N=n, LANES=LANES, num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return fits[0], fits[1], empty.view(torch.bool)


def search_descending(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """symmetric.search_descending for contiguous x [n, B] float32: scale [B] and codes 0 .. 2*half-1, float32 [n, B]."""
    n, count = x.shape
    codes, scale = torch.empty_like(x), x.new_empty(count)
    _descending[(triton.cdiv(count, LANES),)](
        x, codes, scale, count, GROUP_MAX_EPS, float(half),
        HALF=half, N=n, LANES=LANES, num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return scale, codes


def search_uneven(x: Tensor, weights: Tensor) -> Tensor:
    """iq4's search for contiguous x and weights [n, B] float32: scale [B]."""
    n, count = x.shape
    scale = x.new_empty(count)
    _uneven[(triton.cdiv(count, LANES),)](
        x, weights, scale, count, GROUP_MAX_EPS, N=n, LANES=LANES, num_warps=WARPS, enable_fp_fusion=False
    )
    return scale
