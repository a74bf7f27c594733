"""A sweep of second-order rounding on a GPU: a product and one kernel launch for each 256 columns.

Columns depend on each other, rows do not: a program takes a few rows down all columns of the block, with one sub-block of
them at a time in registers. What a sub-block must know of those before it, it asks for as a product with what they moved
by, when its turn comes. In PyTorch a block takes some 150 launches, and a 7B model has 4,500 of them to be visited by every
sweep. The results are those of rows_state.py but for float32 rounding of sums. Column-major as there: [columns, out].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

# columns that a launch goes down, and those of earlier sub-blocks that are asked for at a time
_BLOCK, _REACH = 256, 32
# one warp for few rows: sums over columns then need no barrier, and a matrix of 4,096 rows still fills all processors
_ROWS, _WARPS = 16, 1


@dataclass(frozen=True)
class Blocks:
    """Rows of a matrix as the kernel takes them: float32, contiguous, changed in place.

    levels: [in, out]; d, dmin: [blocks, out]; scale_codes, min_codes, empty: [sub-blocks, out], the codes None for types
    without integer scales, whose sub-blocks are their blocks; then what levels and integer scales can be.
    """

    levels: Tensor
    d: Tensor
    dmin: Tensor | None
    scale_codes: Tensor | None
    min_codes: Tensor | None
    empty: Tensor
    level_range: tuple[float, float]
    code_range: tuple[float, float]


def sweep(blocks: Blocks, residual: Tensor, hessian: Tensor) -> Tensor:
    """Move every part once. residual: [in, out], target minus weights, follows; hessian: [in, in].

    Returns by how much each row's error grew, [out].
    """
    columns, rows = residual.shape
    sub = columns // len(blocks.empty)
    grown = residual.new_zeros(rows)
    gradient, moved = residual.new_empty(_BLOCK, rows), residual.new_empty(_BLOCK, rows)
    turned, turned_across = _turned(blocks, hessian)
    nothing = gradient  # a pointer that the kernel does not follow
    given = [
        nothing if part is None else part
        for part in (turned, turned_across, blocks.d, blocks.dmin, blocks.scale_codes, blocks.min_codes)
    ]
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        torch.mm(hessian[start:stop], residual, out=gradient[: stop - start])
        _sweep_block[(triton.cdiv(rows, _ROWS),)](
            gradient, moved, residual, hessian, blocks.levels, *given, blocks.empty, grown,
            start, stop - start, columns, rows, *blocks.level_range, *blocks.code_range,
            SCALED=blocks.scale_codes is not None, AFFINE=blocks.dmin is not None, BLOCK=_BLOCK, N=sub, REACH=_REACH,
            R=_ROWS, num_warps=_WARPS, num_stages=1,
        )  # fmt: skip
    return grown


def _turned(blocks: Blocks, hessian: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Every super-block's part of the Hessian times the directions of its d and of its dmin, [in, out]: no other
    super-block's move changes them, so they are found for all at once. None for types without integer scales."""
    if blocks.scale_codes is None:
        return None, None
    columns, rows = blocks.levels.shape
    count = columns // _BLOCK
    own = hessian.view(count, _BLOCK, count, _BLOCK).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()
    subs = len(blocks.scale_codes) // count
    along = blocks.levels.view(count * subs, -1, rows) * blocks.scale_codes.unsqueeze(1)
    turned = torch.bmm(own, along.view(count, _BLOCK, rows))
    if blocks.min_codes is None:
        return turned, None
    sums = own.view(count, _BLOCK, subs, -1).sum(-1).neg_()
    return turned, torch.bmm(sums, blocks.min_codes.view(count, subs, rows))


@triton.jit
def _safe(numerator, denominator):  # type: ignore[no-untyped-def]  # Triton's
    usable = denominator > 0.0
    return tl.where(usable, numerator / tl.where(usable, denominator, 1.0), 0.0)


@triton.jit
def _nearest(value, low, high):  # type: ignore[no-untyped-def]  # Triton's
    # a float32 this large has no room for fractions: adding it rounds to the nearest, ties to even
    return tl.minimum(tl.maximum(value, low), high) + 12582912.0 - 12582912.0


@triton.jit
def _solution(pull, stiff, pull_across, mixed, stiff_across):  # type: ignore[no-untyped-def]  # Triton's
    """_Pair.solution."""
    determinant = stiff * stiff_across - mixed * mixed
    solvable = determinant > 1e-6 * stiff * stiff_across
    some = stiff > 0.0
    x = _safe(pull * stiff_across - pull_across * mixed, determinant)
    y = _safe(pull_across * stiff - pull * mixed, determinant)
    alone = tl.where(some, _safe(pull, stiff), 0.0)
    return tl.where(solvable, x, alone), tl.where(solvable, y, tl.where(some, 0.0, _safe(pull_across, stiff_across)))


@triton.jit
def _growth(x, y, pull, stiff, pull_across, mixed, stiff_across):  # type: ignore[no-untyped-def]  # Triton's
    """_Pair.change."""
    return x * (x * stiff - 2 * pull) + y * (y * stiff_across - 2 * pull_across + 2 * x * mixed)


@triton.jit
def _move_floats(d, dmin, pull, stiff, pull_across, mixed, stiff_across, AFFINE: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton's
    """By how much d and dmin move, as float16 holds them, and by how much the error grows; 0 where it would not fall."""
    x, y = _solution(pull, stiff, pull_across, mixed, stiff_across)
    new = (d + x).to(tl.float16).to(tl.float32)
    usable = (tl.abs(new) < float("inf")) & (new != 0.0) & (d != 0.0)
    x = new - d
    if AFFINE:
        new_min = (dmin + y).to(tl.float16).to(tl.float32)
        usable = usable & (tl.abs(new_min) < float("inf"))
        y = new_min - dmin
    grown = _growth(x, y, pull, stiff, pull_across, mixed, stiff_across)
    better = usable & (grown < 0.0)
    return tl.where(better, x, 0.0), tl.where(better, y, 0.0), tl.where(better, grown, 0.0)


@triton.jit
def _move_integers(  # type: ignore[no-untyped-def]  # Triton's
    sc, mc, blank, low, high, pull, stiff, pull_across, mixed, stiff_across, AFFINE: tl.constexpr
):  # fmt: skip
    """By how much a sub-block's integer scale and minimum move; 0 where the error would not fall."""
    x, _ = _solution(pull, stiff, pull_across, mixed, stiff_across)
    new = _nearest(sc + x, low, high)
    x = new - sc
    y = tl.zeros_like(x)
    if AFFINE:
        y = _nearest(mc + _safe(pull_across - x * mixed, stiff_across), low, high) - mc
    better = (_growth(x, y, pull, stiff, pull_across, mixed, stiff_across) < 0.0) & (new != 0.0) & (blank == 0)
    return tl.where(better, x, 0.0), tl.where(better, y, 0.0)


@triton.jit
def _walk(g, x, own, columns, scale, low, high, N: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton's
    """One code after the other to its best value; gradient and levels [N, R] after that."""
    column = tl.arange(0, N)
    inverse = tl.where(scale == 0.0, 0.0, 1.0 / tl.where(scale == 0.0, 1.0, scale))
    for j in range(N):
        here = (column == j)[:, None]
        h = tl.load(own + j * columns + column)
        power = tl.load(own + j * columns + j)
        g_j = tl.sum(tl.where(here, g, 0.0), axis=0)
        x_j = tl.sum(tl.where(here, x, 0.0), axis=0)
        level = _nearest(x_j + g_j * (inverse * (1.0 / power)), low, high)
        g -= h[:, None] * ((level - x_j) * scale)[None, :]
        x = tl.where(here, level[None, :], x)
    return g, x


@triton.jit(do_not_specialize=["start"])
def _sweep_block(  # type: ignore[no-untyped-def]  # Triton's
    gradient, moved, residual, hessian, levels, turned, turned_across, d, dmin, scale_codes, min_codes, empty, grown,
    start, width, columns, rows, low, high, code_low, code_high,
    SCALED: tl.constexpr, AFFINE: tl.constexpr, BLOCK: tl.constexpr, N: tl.constexpr, REACH: tl.constexpr,
    R: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * R + tl.arange(0, R)
    real = row < rows
    inside = real[None, :]
    column = tl.arange(0, N)
    reach = tl.arange(0, REACH)
    at = start.to(tl.int64)
    hessian += at * columns + at
    levels += at * rows
    residual += at * rows
    turned += at * rows
    turned_across += at * rows
    scales = start // N * rows + row  # of the first sub-block
    zero = tl.zeros((R,), dtype=tl.float32)
    total, d_row, dmin_row, d_step, dmin_step = zero, zero, zero, zero, zero
    d_before, dmin_before = zero, zero

    if SCALED:
        pull, stiff, pull_across, mixed, stiff_across = zero, zero, zero, zero, zero
        for s in range(BLOCK // N):
            place = (s * N + column)[:, None] * rows + row[None, :]
            g = tl.load(gradient + place, mask=inside, other=0.0)
            x = tl.load(levels + place, mask=inside, other=0.0)
            t = tl.load(turned + place, mask=inside, other=0.0)
            sc = tl.load(scale_codes + scales + s * rows, mask=real, other=0.0)
            pull += sc * tl.sum(x * g, axis=0)
            stiff += sc * tl.sum(x * t, axis=0)
            if AFFINE:
                mc = tl.load(min_codes + scales + s * rows, mask=real, other=0.0)
                ta = tl.load(turned_across + place, mask=inside, other=0.0)
                pull_across -= mc * tl.sum(g, axis=0)
                mixed -= mc * tl.sum(t, axis=0)
                stiff_across -= mc * tl.sum(ta, axis=0)
        floats = start // BLOCK * rows + row
        d_before = tl.load(d + floats, mask=real, other=0.0)
        if AFFINE:
            dmin_before = tl.load(dmin + floats, mask=real, other=0.0)
        d_step, dmin_step, total = _move_floats(
            d_before, dmin_before, pull, stiff, pull_across, mixed, stiff_across, AFFINE
        )
        d_row, dmin_row = d_before + d_step, dmin_before + dmin_step
        tl.store(d + floats, d_row, mask=real)
        if AFFINE:
            tl.store(dmin + floats, dmin_row, mask=real)

    for s in range(width // N):
        first = s * N
        place = (first + column)[:, None] * rows + row[None, :]
        g = tl.load(gradient + place, mask=inside, other=0.0)
        x = tl.load(levels + place, mask=inside, other=0.0)
        for k in range(0, first, REACH):
            known = (k + reach) < first
            h = tl.load(
                hessian + (first + column)[:, None] * columns + (k + reach)[None, :], mask=known[None, :], other=0.0
            )
            earlier = tl.load(
                moved + (k + reach)[:, None] * rows + row[None, :], mask=known[:, None] & inside, other=0.0
            )
            g -= tl.dot(h, earlier, input_precision="ieee")
        own = hessian + first * columns + first
        square = tl.load(own + column[:, None] * columns + column[None, :])
        ones = tl.sum(square, axis=1)
        if SCALED:
            sc = tl.load(scale_codes + scales + s * rows, mask=real, other=0.0)
            scale_before, scale = d_before * sc, d_row * sc
            minimum_before, minimum = zero, zero
            g -= d_step[None, :] * tl.load(turned + place, mask=inside, other=0.0)
            if AFFINE:
                mc = tl.load(min_codes + scales + s * rows, mask=real, other=0.0)
                minimum_before, minimum = dmin_before * mc, dmin_row * mc
                g -= dmin_step[None, :] * tl.load(turned_across + place, mask=inside, other=0.0)
            along, across = d_row, -dmin_row
        else:
            scale_before = tl.load(d + scales + s * rows, mask=real, other=0.0)
            minimum_before = zero
            if AFFINE:
                minimum_before = tl.load(dmin + scales + s * rows, mask=real, other=0.0)
            scale, minimum = scale_before, minimum_before
            along, across = zero + 1.0, zero - 1.0
        stored = x * scale_before[None, :] - minimum_before[None, :]
        before = x * scale[None, :] - minimum[None, :]
        slope = g

        # its own scales in closed form given the levels: weights move by `along` times them, and by `across`
        t = tl.dot(square, x, input_precision="ieee")
        pull = along * tl.sum(x * g, axis=0)
        stiff = along * along * tl.sum(x * t, axis=0)
        pull_across, mixed, stiff_across = zero, zero, zero
        if AFFINE:
            pull_across = across * tl.sum(g, axis=0)
            mixed = along * across * tl.sum(t, axis=0)
            stiff_across = across * across * tl.sum(ones, axis=0)
        if SCALED:
            blank = tl.load(empty + scales + s * rows, mask=real, other=1)
            if not AFFINE:
                mc = zero
            step, step_min = _move_integers(
                sc, mc, blank, code_low, code_high, pull, stiff, pull_across, mixed, stiff_across, AFFINE
            )
            scale, minimum = d_row * (sc + step), dmin_row * (mc + step_min)
            tl.store(scale_codes + scales + s * rows, sc + step, mask=real)
            if AFFINE:
                tl.store(min_codes + scales + s * rows, mc + step_min, mask=real)
        else:
            step, step_min, _ = _move_floats(scale, minimum, pull, stiff, pull_across, mixed, stiff_across, AFFINE)
            scale += step
            minimum += step_min
            tl.store(d + scales + s * rows, scale, mask=real)
            if AFFINE:
                tl.store(dmin + scales + s * rows, minimum, mask=real)
        g -= t * (along * step)[None, :]
        if AFFINE:
            g -= ones[:, None] * (across * step_min)[None, :]

        g, x = _walk(g, x, own, columns, scale, low, high, N)
        after = x * scale[None, :] - minimum[None, :]
        total -= tl.sum((after - before) * (slope + g), axis=0)
        tl.store(levels + place, x, mask=inside)
        tl.store(moved + place, after - before, mask=inside)
        rest = tl.load(residual + place, mask=inside, other=0.0)
        tl.store(residual + place, rest - (after - stored), mask=inside)
        tl.debug_barrier()
    tl.store(grown + row, tl.load(grown + row, mask=real, other=0.0) + total, mask=real)
