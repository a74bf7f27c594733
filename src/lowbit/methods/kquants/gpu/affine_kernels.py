"""search.py's searches: make_qkx2_quants, make_qkx3_quants and make_qp_quants, one launch each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.methods.kquants.constants import GROUP_MAX_EPS, AffineSearch
from lowbit.methods.kquants.gpu.arithmetic_kernels import LANES, WARPS, clamped, nearest_int


@triton.jit
def _affine_error(
    x, w, lane, inside, count, inverse, base, scale, minimum,
    TOP: tl.constexpr, ABSOLUTE: tl.constexpr, N: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    total = tl.zeros((LANES,), dtype=tl.float32)
    for j in range(N):
        value = tl.load(x + j * count + lane, mask=inside, other=0.0)
        weight = tl.load(w + j * count + lane, mask=inside, other=0.0)
        level = clamped((value - base) * inverse, 0, TOP)
        difference = level * scale + minimum - value
        difference = tl.abs(difference) if ABSOLUTE else difference * difference
        total += difference * weight
    return total


@triton.jit
def _affine(
    x, w, fits, count, top, start, delta,
    TOP: tl.constexpr, TRIALS: tl.constexpr, ABSOLUTE: tl.constexpr, N: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    inside = lane < count
    zero = tl.zeros((LANES,), dtype=tl.float32)
    low = tl.load(x + lane, mask=inside, other=0.0)
    high = low
    sum_w = zero
    sum_x = zero
    for j in range(N):
        value = tl.load(x + j * count + lane, mask=inside, other=0.0)
        weight = tl.load(w + j * count + lane, mask=inside, other=0.0)
        low = tl.where(value < low, value, low)
        high = tl.where(value > high, value, high)
        sum_w += weight
        sum_x += weight * value
    minimum = tl.where(low > 0, 0.0, low)
    constant = high == minimum
    high = tl.where(constant, minimum + 1.0, high)

    inverse = tl.div_rn(zero + top, high - minimum)
    base = minimum
    scale = tl.div_rn(zero + 1.0, inverse)
    best = _affine_error(x, w, lane, inside, count, inverse, base, scale, minimum, TOP, ABSOLUTE, N, LANES)
    for i in range(TRIALS):
        trial = tl.div_rn(zero + ((start + delta * i) + top), high - minimum)
        sum_l = zero
        sum_l2 = zero
        sum_xl = zero
        for j in range(N):
            value = tl.load(x + j * count + lane, mask=inside, other=0.0)
            weight = tl.load(w + j * count + lane, mask=inside, other=0.0)
            level = clamped((value - minimum) * trial, 0, TOP)
            weighted = weight * level
            sum_l += weighted
            sum_l2 += weighted * level
            sum_xl += weighted * value
        determinant = sum_w * sum_l2 - sum_l * sum_l
        new_scale = tl.div_rn(sum_w * sum_xl - sum_x * sum_l, determinant)
        new_minimum = tl.div_rn(sum_l2 * sum_x - sum_l * sum_xl, determinant)
        positive = new_minimum > 0
        new_scale = tl.where(positive, tl.div_rn(sum_xl, sum_l2), new_scale)
        new_minimum = tl.where(positive, 0.0, new_minimum)
        error = _affine_error(
            x, w, lane, inside, count, trial, minimum, new_scale, new_minimum, TOP, ABSOLUTE, N, LANES
        )
        better = (error < best) & (determinant > 0)
        inverse = tl.where(better, trial, inverse)
        base = tl.where(better, minimum, base)
        best = tl.where(better, error, best)
        scale = tl.where(better, new_scale, scale)
        minimum = tl.where(better, new_minimum, minimum)
    tl.store(fits + lane, tl.where(constant, 0.0, scale), mask=inside)
    tl.store(fits + count + lane, minimum, mask=inside)
    tl.store(fits + 2 * count + lane, tl.where(constant, 0.0, inverse), mask=inside)
    tl.store(fits + 3 * count + lane, base, mask=inside)


@triton.jit
def _positive_error(
    x, w, lane, inside, count, inverse, LIMITED: tl.constexpr, TOP: tl.constexpr, N: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    scale = tl.div_rn(tl.zeros((LANES,), dtype=tl.float32) + 1.0, inverse)
    total = tl.zeros((LANES,), dtype=tl.float32)
    for j in range(N):
        value = tl.load(x + j * count + lane, mask=inside, other=0.0)
        weight = tl.load(w + j * count + lane, mask=inside, other=0.0)
        code = nearest_int(inverse * value)
        code = tl.minimum(code, TOP) if LIMITED else code & 0xFF
        difference = value - scale * code.to(tl.float32)
        total += weight * difference * difference
    return total


@triton.jit
def _positive(
    x, w, codes, scales, count, tiny, top, tenth, TOP: tl.constexpr, N: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    inside = lane < count
    zero = tl.zeros((LANES,), dtype=tl.float32)
    largest = zero
    for j in range(N):
        value = tl.load(x + j * count + lane, mask=inside, other=0.0)
        largest = tl.where(largest > value, largest, value)
    empty = largest < tiny
    largest = tl.where(empty, 1.0, largest)
    inverse = tl.div_rn(zero + top, largest)
    best = _positive_error(x, w, lane, inside, count, inverse, False, TOP, N, LANES)
    for step in range(-4, 5):
        trial = tl.div_rn(zero + (tenth * step + top), largest)
        error = _positive_error(x, w, lane, inside, count, trial, True, TOP, N, LANES)
        better = (error < best) & (step != 0)
        best = tl.where(better, error, best)
        inverse = tl.where(better, trial, inverse)
    sum_lx = zero
    sum_l2 = zero
    for j in range(N):
        value = tl.load(x + j * count + lane, mask=inside, other=0.0)
        weight = tl.load(w + j * count + lane, mask=inside, other=0.0)
        code = tl.minimum(nearest_int(inverse * value), TOP)
        wanted = code.to(tl.float32)
        sum_lx += weight * value * wanted
        sum_l2 += weight * wanted * wanted
        tl.store(codes + j * count + lane, code & 0xFF, mask=inside)
    for _ in range(5):
        for j in range(N):
            value = tl.load(x + j * count + lane, mask=inside, other=0.0)
            weight = tl.load(w + j * count + lane, mask=inside, other=0.0)
            code = tl.load(codes + j * count + lane, mask=inside, other=0)
            old = code.to(tl.float32)
            weighted = weight * value
            rest_lx = sum_lx - weighted * old
            rest_l2 = sum_l2 - weight * old * old
            found = tl.minimum(nearest_int(tl.div_rn(value * rest_l2, rest_lx)), TOP)
            new = found.to(tl.float32)
            new_lx = rest_lx + weighted * new
            new_l2 = rest_l2 + weight * new * new
            better = new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2
            better = better & (rest_lx > 0) & (rest_l2 > 0) & (found != code)
            tl.store(codes + j * count + lane, tl.where(better, found & 0xFF, code), mask=inside)
            sum_lx = tl.where(better, new_lx, sum_lx)
            sum_l2 = tl.where(better, new_l2, sum_l2)
    for j in range(N):
        code = tl.load(codes + j * count + lane, mask=inside, other=0)
        tl.store(codes + j * count + lane, tl.where(empty, 0, code), mask=inside)
    scale = tl.where(sum_l2 > 0, tl.div_rn(sum_lx, sum_l2), 0.0)
    tl.store(scales + lane, tl.where(empty, 0.0, scale), mask=inside)


def search_affine(x: Tensor, weights: Tensor, search: AffineSearch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """search.search_affine for contiguous x and weights [n, B] float32: the parts of an AffineFit, [B] each."""
    n, count = x.shape
    fits = x.new_empty(4, count)
    _affine[(triton.cdiv(count, LANES),)](
        x, weights, fits, count, float(search.top), search.start, search.delta,
        TOP=search.top, TRIALS=search.steps + 1, ABSOLUTE=search.absolute_error, N=n, LANES=LANES,
        num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    scale, minimum, inverse, base = fits.unbind(0)
    return scale, minimum.neg(), inverse, base  # Triton's minus is 0 - x, which has no -0


def search_positive(x: Tensor, weights: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """search.search_positive for contiguous x and weights [n, B] float32: scale [B] and codes int32 [n, B]."""
    n, count = x.shape
    codes, scale = torch.empty_like(x, dtype=torch.int32), x.new_empty(count)
    _positive[(triton.cdiv(count, LANES),)](
        x, weights, codes, scale, count, GROUP_MAX_EPS, float(top), 0.1,
        TOP=top, N=n, LANES=LANES, num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return scale, codes
