"""The sequential loops of second-order rounding onto ggml's grids, as one GPU kernel launch for each stretch of columns.

Columns depend on each other, rows do not: a program keeps a few rows with all columns of the stretch in registers and
walks through the columns there. In PyTorch the loops take about a dozen launches a column, and a 7B model has a million
columns to be visited by every sweep. The results are those of rows_state.py and second_order.py but for float32 rounding
of sums. Column-major as there: [columns, out].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _WIDE_ROWS = 16, 32


@triton.jit
def _nearest(value, low, high):  # type: ignore[no-untyped-def]  # Triton's
    # a float32 this large has no room for fractions: adding it rounds to the nearest, ties to even
    return tl.minimum(tl.maximum(value, low), high) + 12582912.0 - 12582912.0


@triton.jit
def _compensate(weight, factor, scale, minimum, levels, errors, rows, low, high, N: tl.constexpr, R: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton's
    row = tl.program_id(0) * R + tl.arange(0, R)
    column = tl.arange(0, N)
    place = column[:, None] * rows + row[None, :]
    inside = (row < rows)[None, :]
    w = tl.load(weight + place, mask=inside, other=0.0)
    s = tl.load(scale + place, mask=inside, other=1.0)
    m = tl.load(minimum + place, mask=inside, other=0.0)
    found = tl.zeros((N, R), dtype=tl.float32)
    e = tl.zeros((N, R), dtype=tl.float32)
    for j in range(N):
        here = (column == j)[:, None]
        w_j = tl.sum(tl.where(here, w, 0.0), axis=0)
        s_j = tl.sum(tl.where(here, s, 0.0), axis=0)
        m_j = tl.sum(tl.where(here, m, 0.0), axis=0)
        u = tl.load(factor + j * N + column)  # zero before the diagonal
        u_jj = tl.sum(tl.where(column == j, u, 0.0), axis=0)
        ratio = tl.where(s_j == 0.0, 0.0, (w_j + m_j) / tl.where(s_j == 0.0, 1.0, s_j))
        level = _nearest(ratio, low, high)
        error = (w_j - (s_j * level - m_j)) / u_jj
        w -= u[:, None] * error[None, :]
        found = tl.where(here, level[None, :], found)
        e = tl.where(here, error[None, :], e)
    tl.store(levels + place, found, mask=inside)
    tl.store(errors + place, e, mask=inside)


@triton.jit
def _safe(numerator, denominator):  # type: ignore[no-untyped-def]  # Triton's
    usable = denominator > 0.0
    return tl.where(usable, numerator / tl.where(usable, denominator, 1.0), 0.0)


@triton.jit
def _move(  # type: ignore[no-untyped-def]  # Triton's
    gradient, square, stride, levels, d, dmin, scale_codes, min_codes, empty, change, rows, low, high, code_low, code_high,
    SCALED: tl.constexpr, AFFINE: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * R + tl.arange(0, R)
    column = tl.arange(0, N)
    place = column[:, None] * rows + row[None, :]
    real = row < rows
    inside = real[None, :]
    g = tl.load(gradient + place, mask=inside, other=0.0)
    x = tl.load(levels + place, mask=inside, other=0.0)
    d_row = tl.load(d + row, mask=real, other=1.0)
    dmin_row = tl.zeros((R,), dtype=tl.float32)
    sc = tl.zeros((R,), dtype=tl.float32) + 1.0
    mc = tl.zeros((R,), dtype=tl.float32) + 1.0
    if AFFINE:
        dmin_row = tl.load(dmin + row, mask=real, other=0.0)
    if SCALED:
        sc = tl.load(scale_codes + row, mask=real, other=1.0)
        if AFFINE:
            mc = tl.load(min_codes + row, mask=real, other=0.0)
    before = x * (d_row * sc)[None, :] - (dmin_row * mc)[None, :]
    if SCALED:
        # the integer scale and minimum in closed form given the levels: q moves by s * along + m * across
        along = x * d_row[None, :]
        turned = tl.zeros((N, R), dtype=tl.float32)
        ones = tl.zeros((N,), dtype=tl.float32)
        for j in range(N):
            h = tl.load(square + column * stride + j)
            a_j = tl.sum(tl.where((column == j)[:, None], along, 0.0), axis=0)
            turned += h[:, None] * a_j[None, :]
            ones += h
        pull = tl.sum(along * g, axis=0)
        stiff = tl.sum(along * turned, axis=0)
        pull_across = -dmin_row * tl.sum(g, axis=0)
        mixed = -dmin_row * tl.sum(turned, axis=0)
        stiff_across = dmin_row * dmin_row * tl.sum(ones, axis=0)
        step = _safe(pull, stiff)
        if AFFINE:
            determinant = stiff * stiff_across - mixed * mixed
            both = _safe(pull * stiff_across - pull_across * mixed, determinant)
            step = tl.where(determinant > 1e-6 * stiff * stiff_across, both, tl.where(stiff > 0.0, step, 0.0))
        new = _nearest(sc + step, code_low, code_high)
        moved = new - sc
        moved_min = tl.zeros((R,), dtype=tl.float32)
        grown = moved * (moved * stiff - 2 * pull)
        if AFFINE:
            best = _safe(pull_across - moved * mixed, stiff_across)
            moved_min = _nearest(mc + best, code_low, code_high) - mc
            grown += moved_min * (moved_min * stiff_across - 2 * pull_across + 2 * moved * mixed)
        blank = tl.load(empty + row, mask=real, other=1)
        better = (grown < 0.0) & (blank == 0) & (new != 0.0)
        moved = tl.where(better, moved, 0.0)
        moved_min = tl.where(better, moved_min, 0.0)
        sc += moved
        mc += moved_min
        g -= turned * moved[None, :] - ones[:, None] * (dmin_row * moved_min)[None, :]
        tl.store(scale_codes + row, sc, mask=real)
        if AFFINE:
            tl.store(min_codes + row, mc, mask=real)
    scale = d_row * sc
    minimum = dmin_row * mc
    for j in range(N):
        here = (column == j)[:, None]
        h = tl.load(square + column * stride + j)
        h_jj = tl.sum(tl.where(column == j, h, 0.0), axis=0)
        g_j = tl.sum(tl.where(here, g, 0.0), axis=0)
        x_j = tl.sum(tl.where(here, x, 0.0), axis=0)
        wanted = (scale * x_j - minimum) + g_j / h_jj
        ratio = (wanted + minimum) / tl.where(scale == 0.0, 1.0, scale)
        level = _nearest(ratio, low, high)
        level = tl.where(scale == 0.0, x_j, level)
        g -= h[:, None] * ((level - x_j) * scale)[None, :]
        x = tl.where(here, level[None, :], x)
    tl.store(levels + place, x, mask=inside)
    tl.store(change + place, x * scale[None, :] - minimum[None, :] - before, mask=inside)


def compensate(
    weight: Tensor, factor: Tensor, scale: Tensor, minimum: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """GPTQ's loop within one stretch of columns. weight, scale, minimum: [n, out]; factor: [n, n], its upper triangle counts.

    Returns levels and errors [n, out].
    """
    columns, rows = weight.shape
    width = triton.next_power_of_2(columns)
    padded = [_padded(tensor, width, fill) for tensor, fill in ((weight, 0.0), (scale, 1.0), (minimum, 0.0))]
    square = torch.eye(width, device=weight.device)
    square[:columns, :columns] = factor.triu()
    levels, errors = torch.empty_like(padded[0]), torch.empty_like(padded[0])
    grid = (triton.cdiv(rows, _ROWS),)
    _compensate[grid](
        padded[0], square, padded[1], padded[2], levels, errors, rows, low, high, N=width, R=_ROWS, num_warps=4
    )
    return levels[:columns], errors[:columns]


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

    gradient, levels: [sub, out]; square: [sub, sub], rows any stride apart; the rest [out]. Returns what the weights
    changed by, [sub, out].
    """
    change = torch.empty_like(levels)
    columns, rows = levels.shape
    nothing = d  # a pointer that the kernel does not follow
    _move[(triton.cdiv(rows, _WIDE_ROWS),)](
        gradient, square, square.stride(0), levels, d, nothing if dmin is None else dmin,
        nothing if scale_codes is None else scale_codes, nothing if min_codes is None else min_codes,
        empty, change, rows, *level_range, *code_range,
        SCALED=scale_codes is not None, AFFINE=dmin is not None, N=columns, R=_WIDE_ROWS, num_warps=2,
    )  # fmt: skip
    return change


def _padded(tensor: Tensor, height: int, fill: float) -> Tensor:
    missing = height - tensor.shape[0]
    return torch.nn.functional.pad(tensor, (0, 0, 0, missing), value=fill).contiguous()
