"""ggml's scale searches as GPU kernels, one launch each: a lane walks through the weights of its own sub-block.

In PyTorch each of the 17 to 37 trials reads and writes all weights about a dozen times. A lane adds its terms up in the
order of the C and every operation is rounded on its own (no fused multiply-add, divisions to the nearest, denormals
kept), so the results are exactly those of search.py and symmetric.py. Element-major as there: a step of all lanes
reads consecutive weights, and what it reads again in the next trial still lies in the caches.
libdevice's own division would flush denormals here, `tl.div_rn` keeps them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.methods.kquants.arithmetic import GROUP_MAX_EPS

if TYPE_CHECKING:
    from lowbit.methods.kquants.search import AffineSearch

# one lane a thread: what a lane stores it may read again
_LANES, _WARPS = 128, 4


@triton.jit
def _nearest_int(value):  # type: ignore[no-untyped-def]  # Triton's
    bits = (value + 12582912.0).to(tl.int32, bitcast=True)
    return tl.where(value != value, 0, (bits & 0x007FFFFF) - 0x00400000)


@triton.jit
def _clamped(value, LOW: tl.constexpr, HIGH: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton's
    return tl.minimum(tl.maximum(_nearest_int(value), LOW), HIGH).to(tl.float32)


@triton.jit
def _rounded(value, HALF: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton's
    # for values in range, which lets NaN through as torch does; a float32 this large has no room for fractions
    whole = (value + 12582912.0) - 12582912.0
    whole = tl.where(whole < -HALF, -HALF * 1.0, whole)
    return tl.where(whole > HALF - 1, (HALF - 1) * 1.0, whole)


@triton.jit
def _affine_error(  # type: ignore[no-untyped-def]  # Triton's
    x, w, lane, inside, count, inverse, base, scale, minimum,
    TOP: tl.constexpr, ABSOLUTE: tl.constexpr, N: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    total = tl.zeros((LANES,), dtype=tl.float32)
    for j in range(N):
        value = tl.load(x + j * count + lane, mask=inside, other=0.0)
        weight = tl.load(w + j * count + lane, mask=inside, other=0.0)
        level = _clamped((value - base) * inverse, 0, TOP)
        difference = level * scale + minimum - value
        difference = tl.abs(difference) if ABSOLUTE else difference * difference
        total += difference * weight
    return total


@triton.jit
def _affine(  # type: ignore[no-untyped-def]  # Triton's
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
            level = _clamped((value - minimum) * trial, 0, TOP)
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
    tl.store(fits + count + lane, -minimum, mask=inside)
    tl.store(fits + 2 * count + lane, tl.where(constant, 0.0, inverse), mask=inside)
    tl.store(fits + 3 * count + lane, base, mask=inside)


@triton.jit
def _extreme(x, lane, inside, count, N: tl.constexpr, LANES: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton's
    largest = tl.zeros((LANES,), dtype=tl.float32)
    signed = tl.zeros((LANES,), dtype=tl.float32)
    for j in range(N):
        value = tl.load(x + j * count + lane, mask=inside, other=0.0)
        larger = tl.abs(value) > largest
        signed = tl.where(larger, value, signed)
        largest = tl.where(larger, tl.abs(value), largest)
    return largest, signed


@triton.jit
def _moments(  # type: ignore[no-untyped-def]  # Triton's
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
def _symmetric(  # type: ignore[no-untyped-def]  # Triton's
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
def _descending(  # type: ignore[no-untyped-def]  # Triton's
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
            new = _clamped(tl.div_rn(value * rest_l2, rest_lx), -HALF, HALF - 1)
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
def _positive_error(  # type: ignore[no-untyped-def]  # Triton's
    x, w, lane, inside, count, inverse, LIMITED: tl.constexpr, TOP: tl.constexpr, N: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    scale = tl.div_rn(tl.zeros((LANES,), dtype=tl.float32) + 1.0, inverse)
    total = tl.zeros((LANES,), dtype=tl.float32)
    for j in range(N):
        value = tl.load(x + j * count + lane, mask=inside, other=0.0)
        weight = tl.load(w + j * count + lane, mask=inside, other=0.0)
        code = _nearest_int(inverse * value)
        code = tl.minimum(code, TOP) if LIMITED else code & 0xFF
        difference = value - scale * code.to(tl.float32)
        total += weight * difference * difference
    return total


@triton.jit
def _positive(  # type: ignore[no-untyped-def]  # Triton's
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
        code = tl.minimum(_nearest_int(inverse * value), TOP)
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
            found = tl.minimum(_nearest_int(tl.div_rn(value * rest_l2, rest_lx)), TOP)
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
    _affine[(triton.cdiv(count, _LANES),)](
        x, weights, fits, count, float(search.top), search.start, search.delta,
        TOP=search.top, TRIALS=search.steps + 1, ABSOLUTE=search.absolute_error, N=n, LANES=_LANES,
        num_warps=_WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    scale, minimum, inverse, base = fits.unbind(0)
    return scale, minimum, inverse, base


def search_symmetric(x: Tensor, weights: Tensor, half: int) -> tuple[Tensor, Tensor, Tensor]:
    """symmetric.search_symmetric for contiguous x and weights [n, B] float32: the parts of a SymmetricFit, [B] each."""
    n, count = x.shape
    fits = x.new_empty(2, count)
    empty = x.new_empty(count, dtype=torch.uint8)
    _symmetric[(triton.cdiv(count, _LANES),)](
        x, weights, fits, empty, count, GROUP_MAX_EPS, float(half), 0.1,
        HALF=half, N=n, LANES=_LANES, num_warps=_WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return fits[0], fits[1], empty.view(torch.bool)


def search_descending(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """symmetric.search_descending for contiguous x [n, B] float32: scale [B] and codes 0 .. 2*half-1, float32 [n, B]."""
    n, count = x.shape
    codes, scale = torch.empty_like(x), x.new_empty(count)
    _descending[(triton.cdiv(count, _LANES),)](
        x, codes, scale, count, GROUP_MAX_EPS, float(half),
        HALF=half, N=n, LANES=_LANES, num_warps=_WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return scale, codes


def search_positive(x: Tensor, weights: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """search.search_positive for contiguous x and weights [n, B] float32: scale [B] and codes int32 [n, B]."""
    n, count = x.shape
    codes, scale = torch.empty_like(x, dtype=torch.int32), x.new_empty(count)
    _positive[(triton.cdiv(count, _LANES),)](
        x, weights, codes, scale, count, GROUP_MAX_EPS, float(top), 0.1,
        TOP=top, N=n, LANES=_LANES, num_warps=_WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return scale, codes
