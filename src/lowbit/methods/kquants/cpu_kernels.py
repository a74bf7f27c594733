"""The sequential loops of second-order rounding onto ggml's grids, compiled by numba where that is installed (the extra `cpu`).

As kernels.py does on a GPU: rows do not depend on each other, so a few of them at a time walk through all columns of the
stretch in the first cache. In PyTorch the loops take about a dozen calls a column. The results are those of rows_state.py
and second_order.py but for float32 rounding of sums. Column-major as there, [columns, out]; callers divide rows over
threads, and compiled code does not hold the interpreter's lock.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowbit.methods.compiling import compiled

_LANES = 64  # rows at a time: several vectors a column, and 32 columns of three arrays fit into the first cache


def compensate(
    weight: Tensor, factor: Tensor, scale: Tensor, minimum: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """GPTQ's loop within one stretch of columns. weight, scale, minimum: [n, out]; factor: [n, n], its upper triangle counts.

    Returns levels and errors [n, out].
    """
    levels, errors = torch.empty(weight.shape), torch.empty(weight.shape)
    given = [_array(tensor) for tensor in (weight, factor, scale, minimum)]
    _compensate(*given, levels.numpy(), errors.numpy(), np.float32(low), np.float32(high))
    return levels, errors


def move_sub_block(
    gradient: Tensor,
    square: Tensor,
    levels: Tensor,
    d: Tensor,
    dmin: Tensor | None,
    scale_codes: Tensor | None,
    min_codes: Tensor | None,
    empty: Tensor,
    level_range: tuple[float, float],
    code_range: tuple[float, float],
) -> Tensor:
    """Integer scales of one sub-block to their best values, then its levels one after the other, all in place.

    gradient, levels: [sub, out]; square: [sub, sub]; the rest [out]; what is changed must be contiguous. Returns what the
    weights changed by, [sub, out].
    """
    change = torch.empty(levels.shape)
    nothing = d.numpy()  # that is not looked at
    codes = nothing if scale_codes is None else scale_codes.numpy()
    minimums = nothing if min_codes is None else min_codes.numpy()
    _move(
        _array(gradient), _array(square), levels.numpy(), d.numpy(), nothing if dmin is None else dmin.numpy(),
        codes, minimums, empty.numpy(), change.numpy(), *(np.float32(value) for value in (*level_range, *code_range)),
        scale_codes is not None, dmin is not None,
    )  # fmt: skip
    return change


def _array(tensor: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = tensor.contiguous().numpy()
    return array


@compiled(fastmath={"contract"})
def _compensate(weight, factor, scale, minimum, levels, errors, low, high):
    columns, rows = weight.shape
    w = np.empty((columns, _LANES), np.float32)
    for start in range(0, rows, _LANES):
        width = min(_LANES, rows - start)
        _take(weight, start, width, w)
        for j in range(columns):
            strength = np.float32(1) / factor[j, j]
            for k in range(width):
                s, m = scale[j, start + k], minimum[j, start + k]
                ratio = (w[j, k] + m) / s if s != 0 else np.float32(0)
                level = min(max(np.rint(ratio), low), high)
                levels[j, start + k] = level
                errors[j, start + k] = (w[j, k] - (s * level - m)) * strength
            for i in range(j + 1, columns):
                u = factor[j, i]
                for k in range(width):
                    w[i, k] -= u * errors[j, start + k]


@compiled()
def _take(array, start, width, out):
    for i in range(len(array)):
        for k in range(width):
            out[i, k] = array[i, start + k]


@compiled(fastmath={"contract"})
def _move(
    gradient,
    square,
    levels,
    d,
    dmin,
    scale_codes,
    min_codes,
    empty,
    change,
    low,
    high,
    code_low,
    code_high,
    scaled,
    affine,
):
    n, rows = levels.shape
    g, x = np.empty((n, _LANES), np.float32), np.empty((n, _LANES), np.float32)
    turned = np.empty((n, _LANES), np.float32)
    scale, minimum = np.empty(_LANES, np.float32), np.empty(_LANES, np.float32)
    step = np.empty(_LANES, np.float32)
    for start in range(0, rows, _LANES):
        width = min(_LANES, rows - start)
        _take(gradient, start, width, g)
        _take(levels, start, width, x)
        for k in range(width):
            row = start + k
            scale[k] = d[row] * scale_codes[row] if scaled else d[row]
            minimum[k] = np.float32(0)
            if affine:
                minimum[k] = dmin[row] * min_codes[row] if scaled else dmin[row]
        for i in range(n):
            for k in range(width):
                change[i, start + k] = x[i, k] * scale[k] - minimum[k]
        if scaled:
            _move_integers(
                g, x, turned, square, d, dmin, scale_codes, min_codes, empty, scale, minimum, code_low, code_high, affine,
                start, width,
            )  # fmt: skip
        for j in range(n):
            inverse = np.float32(1) / square[j, j]
            for k in range(width):
                s, m, old = scale[k], minimum[k], x[j, k]
                wanted = (s * old - m) + g[j, k] * inverse
                level = min(max(np.rint((wanted + m) / s), low), high) if s != 0 else old
                step[k] = (level - old) * s
                x[j, k] = level
            for i in range(j + 1, n):
                h = square[i, j]
                for k in range(width):
                    g[i, k] -= h * step[k]
        for i in range(n):
            for k in range(width):
                row = start + k
                levels[i, row] = x[i, k]
                change[i, row] = x[i, k] * scale[k] - minimum[k] - change[i, row]


@compiled(fastmath={"contract"})
def _move_integers(
    g,
    x,
    turned,
    square,
    d,
    dmin,
    scale_codes,
    min_codes,
    empty,
    scale,
    minimum,
    code_low,
    code_high,
    affine,
    start,
    width,
):
    """The integer scale and minimum in closed form given the levels: the weight moves by a * along + b * across, where along
    is d * level and across is -dmin. g, scale and minimum follow."""
    n, zero = len(x), np.float32(0)
    # of every row: sums of level * g, level * turned, g and turned
    sums = np.zeros((4, _LANES), np.float32)
    ones, total = np.zeros(n, np.float32), zero
    turned[:] = zero
    for i in range(n):
        for j in range(n):
            h = square[i, j]
            ones[i] += h
            for k in range(width):
                turned[i, k] += h * x[j, k]
        total += ones[i]
        for k in range(width):
            sums[0, k] += x[i, k] * g[i, k]
            sums[1, k] += x[i, k] * turned[i, k]
            sums[2, k] += g[i, k]
            sums[3, k] += turned[i, k]
    moves, minimum_moves = np.zeros(_LANES, np.float32), np.zeros(_LANES, np.float32)
    for k in range(width):
        row = start + k
        pull, stiff, slope, mixed = sums[0, k], sums[1, k], sums[2, k], sums[3, k]
        along, across = d[row], -dmin[row] if affine else zero
        pull, stiff, mixed = pull * along, stiff * along * along, mixed * along * across
        pull_across, stiff_across = slope * across, total * across * across
        best = _ratio(pull, stiff)
        if affine:
            determinant = stiff * stiff_across - mixed * mixed
            if determinant > np.float32(1e-6) * stiff * stiff_across:
                best = _ratio(pull * stiff_across - pull_across * mixed, determinant)
        new = min(max(np.rint(scale_codes[row] + best), code_low), code_high)
        moved, moved_min = new - scale_codes[row], zero
        grown = moved * (moved * stiff - 2 * pull)
        if affine:
            least = _ratio(pull_across - moved * mixed, stiff_across)
            moved_min = min(max(np.rint(min_codes[row] + least), code_low), code_high) - min_codes[row]
            grown += moved_min * (moved_min * stiff_across - 2 * pull_across + 2 * moved * mixed)
        if not (grown < 0 and new != 0) or empty[row]:
            continue
        scale_codes[row] = new
        scale[k] = along * new
        if affine:
            min_codes[row] += moved_min
            minimum[k] = dmin[row] * min_codes[row]
        moves[k], minimum_moves[k] = along * moved, across * moved_min
    for i in range(n):
        for k in range(width):
            g[i, k] -= turned[i, k] * moves[k] + ones[i] * minimum_moves[k]


@compiled()
def _ratio(numerator, denominator):
    return numerator / denominator if denominator > 0 else np.float32(0)
