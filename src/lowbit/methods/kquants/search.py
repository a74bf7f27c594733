"""Scale searches over affine grids: ggml's make_qkx2_quants, make_qkx3_quants and make_qp_quants.

Every function takes element-major tensors `[n elements of a sub-block, B sub-blocks]` (float32) and treats the B
sub-blocks independently. Nothing is returned that can be recomputed: codes come from `AffineFit.codes`. On a GPU
the package `gpu` does the same in one launch.
Source: llama.cpp, ggml/src/ggml-quants.c.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.methods.kquants.arithmetic import (
    NEAREST_INT_LIMIT,
    first_min_max,
    nearest_int,
    ratio,
    round_clamped_,
    sequential_sum,
    wrap_uint8,
)
from lowbit.methods.kquants.constants import GROUP_MAX_EPS, AffineSearch, f32
from lowbit.methods.kquants.loops import gpu_for

SLICE_WEIGHTS = 1 << 17  # larger slices leave the CPU's caches, smaller ones drown in calls
CUDA_SLICE_WEIGHTS = 1 << 25  # a GPU wants few, long calls


@dataclass(frozen=True)
class AffineFit:
    """`x ~ scale * code - minimum` for each of B sub-blocks (all `[B]`); codes are round(inverse * (x - base))."""

    scale: Tensor
    minimum: Tensor
    inverse: Tensor
    base: Tensor

    def codes(self, x: Tensor, top: int, which: Tensor) -> Tensor:
        """Codes the search settled on for the sub-blocks `which` (indices `[K]`): float32 `[n, K]`."""
        values = (x[:, which] - self.base[which]) * self.inverse[which]
        return round_clamped_(values, 0, top)


def search_affine(x: Tensor, weights: Tensor, search: AffineSearch) -> AffineFit:
    """Weighted least-squares scale and minimum of every sub-block (make_qkx2_quants / make_qkx3_quants)."""
    gpu = gpu_for(x)
    search_slice = _search_affine_slice if gpu is None else gpu.search_affine
    width = (CUDA_SLICE_WEIGHTS if x.is_cuda else SLICE_WEIGHTS) // x.shape[0]
    parts = [
        search_slice(x[:, at : at + width].contiguous(), weights[:, at : at + width].contiguous(), search)
        for at in range(0, x.shape[1], width)
    ]
    return AffineFit(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _search_affine_slice(x: Tensor, w: Tensor, search: AffineSearch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    top = search.top
    low, high = first_min_max(x)
    sum_w = sequential_sum(w)
    sum_x = sequential_sum(w * x)
    minimum = torch.where(low > 0, 0.0, low)
    constant = high == minimum
    # A constant sub-block is never updated below (its determinant is 0 or NaN); any range but 0 keeps it in range.
    high = torch.where(constant, minimum + 1.0, high)

    level = torch.empty_like(x)
    terms = x.new_empty(3, *x.shape)
    weighted, squared, crossed = terms.unbind(0)
    level_rows, term_rows = level.unbind(0), terms.unbind(1)
    inverse = ratio(float(top), high - minimum)
    base = minimum
    scale = ratio(1.0, inverse)
    _levels_(level, x, inverse, base, low, high, top)
    _error_terms_(level, x, w, scale, minimum, search.absolute_error)
    best = sequential_sum(level_rows)

    for numerator in search.numerators():
        trial = ratio(numerator, high - minimum)
        _levels_(level, x, trial, minimum, low, high, top)
        torch.mul(w, level, out=weighted)
        torch.mul(weighted, level, out=squared)
        torch.mul(weighted, x, out=crossed)
        sum_l, sum_l2, sum_xl = sequential_sum(term_rows).unbind(0)

        determinant = sum_w * sum_l2 - sum_l * sum_l
        new_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        new_minimum = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        positive = new_minimum > 0
        new_scale = torch.where(positive, sum_xl / sum_l2, new_scale)
        new_minimum.masked_fill_(positive, 0.0)

        _error_terms_(level, x, w, new_scale, new_minimum, search.absolute_error)
        error = sequential_sum(level_rows)
        better = (error < best) & (determinant > 0)
        inverse = torch.where(better, trial, inverse)
        base = torch.where(better, minimum, base)
        best = torch.where(better, error, best)
        scale = torch.where(better, new_scale, scale)
        minimum = torch.where(better, new_minimum, minimum)

    return scale.masked_fill(constant, 0.0), -minimum, inverse.masked_fill(constant, 0.0), base


def _levels_(out: Tensor, x: Tensor, inverse: Tensor, base: Tensor, low: Tensor, high: Tensor, top: int) -> None:
    """out = clamp(nearest_int(inverse * (x - base)), 0, top). The ends of a sub-block bound its values."""
    ends = torch.maximum(((low - base) * inverse).abs_(), ((high - base) * inverse).abs_())
    torch.sub(x, base, out=out)
    round_clamped_(out.mul_(inverse), 0, top, in_range=bool(ends.max() <= NEAREST_INT_LIMIT))


def _error_terms_(level: Tensor, x: Tensor, w: Tensor, scale: Tensor, minimum: Tensor, absolute: bool) -> None:
    """level = w * |scale*level + minimum - x|^(1 or 2)."""
    difference = level.mul_(scale).add_(minimum).sub_(x)
    difference = difference.abs_() if absolute else difference.mul_(difference)
    difference.mul_(w)


def search_positive(x: Tensor, weights: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """make_qp_quants: one positive scale for `[n, B]` values >= 0 with codes 0..top; returns `[B]`, int32 `[n, B]`.

    Used for the scales and minimums of a super-block when importance is given.
    """
    gpu = gpu_for(x)
    if gpu is not None:
        found: tuple[Tensor, Tensor] = gpu.search_positive(x.contiguous(), weights.contiguous(), top)
        return found
    largest = torch.zeros_like(x[0])
    for row in x.unbind(0):
        largest = torch.where(largest > row, largest, row)
    empty = largest < GROUP_MAX_EPS
    largest = torch.where(empty, 1.0, largest)

    inverse = ratio(float(top), largest)
    codes = wrap_uint8(nearest_int(inverse * x))
    best = _squared_error(x, weights, ratio(1.0, inverse), codes)
    for step in (-4, -3, -2, -1, 1, 2, 3, 4):
        trial = ratio(f32(f32(f32(0.1) * step) + top), largest)
        error = _squared_error(x, weights, ratio(1.0, trial), nearest_int(trial * x).clamp_(max=top))
        better = error < best
        best = torch.where(better, error, best)
        inverse = torch.where(better, trial, inverse)

    wanted = nearest_int(inverse * x).clamp_(max=top)
    sum_lx = sequential_sum(weights * x * wanted)
    sum_l2 = sequential_sum(weights * wanted * wanted)
    codes = wrap_uint8(wanted)
    scale = _descend(x, weights, codes, sum_lx, sum_l2, top)
    return scale.masked_fill_(empty, 0.0), codes.masked_fill_(empty, 0)


def _squared_error(x: Tensor, weights: Tensor, scale: Tensor, codes: Tensor) -> Tensor:
    difference = x - scale * codes
    return sequential_sum(weights * difference * difference)


def _descend(x: Tensor, weights: Tensor, codes: Tensor, sum_lx: Tensor, sum_l2: Tensor, top: int) -> Tensor:
    """Five rounds of coordinate descent over the codes (changed in place); returns the least-squares scale."""
    for _ in range(5):
        changed = torch.zeros_like(sum_lx, dtype=torch.bool)
        for value, w, code in zip(x.unbind(0), weights.unbind(0), codes.unbind(0), strict=True):
            weighted = w * value
            rest_lx = sum_lx - weighted * code
            rest_l2 = sum_l2 - w * code * code
            new = nearest_int(value * rest_l2 / rest_lx).clamp_(max=top)
            new_lx = rest_lx + weighted * new
            new_l2 = rest_l2 + w * new * new
            better = new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2
            better &= (rest_lx > 0) & (rest_l2 > 0) & (new != code)
            code.copy_(torch.where(better, wrap_uint8(new), code))
            sum_lx = torch.where(better, new_lx, sum_lx)
            sum_l2 = torch.where(better, new_l2, sum_l2)
            changed |= better
        if not bool(changed.any()):
            break
    return torch.where(sum_l2 > 0, sum_lx / sum_l2, 0.0)
