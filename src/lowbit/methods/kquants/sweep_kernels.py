"""A sweep of second-order rounding on a GPU: a share of a product and one kernel launch for each 256 columns.

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

from lowbit.methods.kquants.pair_kernels import move_floats, move_integers, nearest

# columns of a product: of one launch's alone they would leave processors idle
_WIDE = 512
# columns that a launch goes down, and those of earlier sub-blocks that are asked for at a time
_BLOCK, _REACH = 256, 32
# one warp for few rows: sums over columns then need no barrier, and a matrix of 4,096 rows still fills all processors
_ROWS, _WARPS, _STAGES = 16, 1, 1


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
    gradient, change = residual.new_empty(_WIDE, rows), residual.new_empty(_WIDE, rows)
    moved = residual.new_empty(_BLOCK, rows)
    turned, turned_across = _turned(blocks, hessian)
    limits = [float(limit) for limit in (*blocks.level_range, *blocks.code_range)]
    nothing = gradient  # a pointer that the kernel does not follow
    given = [
        nothing if part is None else part
        for part in (turned, turned_across, blocks.d, blocks.dmin, blocks.scale_codes, blocks.min_codes)
    ]
    for start in range(0, columns, _WIDE):
        stop = min(start + _WIDE, columns)
        torch.mm(hessian[start:stop], residual, out=gradient[: stop - start])
        for first in range(start, stop, _BLOCK):
            last = min(first + _BLOCK, stop)
            here = slice(first - start, last - start)
            if first > start:
                gradient[here].addmm_(hessian[first:last, start:first], change[: first - start], alpha=-1)
            _sweep_block[(triton.cdiv(rows, _ROWS),)](
                gradient[here], moved, change[here], hessian, blocks.levels, *given, blocks.empty, grown,
                first, last - first, columns, rows, *limits,
                SCALED=blocks.scale_codes is not None, AFFINE=blocks.dmin is not None, BLOCK=_BLOCK, N=sub,
                REACH=_REACH, R=_ROWS, num_warps=_WARPS, num_stages=_STAGES,
            )  # fmt: skip
        residual[start:stop] -= change[: stop - start]
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
def _walk(g, x, own, columns, scale, low, high, N: tl.constexpr):
    """One code after the other to its best value; gradient and levels [N, R] after that."""
    column = tl.arange(0, N)
    inverse = tl.where(scale == 0.0, 0.0, 1.0 / tl.where(scale == 0.0, 1.0, scale))
    for j in range(N):
        here = (column == j)[:, None]
        h = tl.load(own + j * columns + column)
        power = tl.load(own + j * columns + j)
        g_j = tl.sum(tl.where(here, g, 0.0), axis=0)
        x_j = tl.sum(tl.where(here, x, 0.0), axis=0)
        level = nearest(x_j + g_j * (inverse * (1.0 / power)), low, high)
        g -= h[:, None] * ((level - x_j) * scale)[None, :]
        x = tl.where(here, level[None, :], x)
    return g, x


@triton.jit
def _super_block(
    gradient, levels, turned, turned_across, scale_codes, min_codes, row, rows,
    AFFINE: tl.constexpr, BLOCK: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """The error as a quadratic in d and dmin of a super-block, as in Pair."""
    real = row < rows
    column = tl.arange(0, N)
    zero = tl.zeros((R,), dtype=tl.float32)
    pull, stiff, pull_across, mixed, stiff_across = zero, zero, zero, zero, zero
    for s in range(BLOCK // N):
        place = (s * N + column)[:, None] * rows + row[None, :]
        g = tl.load(gradient + place, mask=real[None, :], other=0.0)
        x = tl.load(levels + place, mask=real[None, :], other=0.0)
        t = tl.load(turned + place, mask=real[None, :], other=0.0)
        sc = tl.load(scale_codes + s * rows, mask=real, other=0.0)
        pull += sc * tl.sum(x * g, axis=0)
        stiff += sc * tl.sum(x * t, axis=0)
        if AFFINE:
            mc = tl.load(min_codes + s * rows, mask=real, other=0.0)
            ta = tl.load(turned_across + place, mask=real[None, :], other=0.0)
            pull_across -= mc * tl.sum(g, axis=0)
            mixed -= mc * tl.sum(t, axis=0)
            stiff_across -= mc * tl.sum(ta, axis=0)
    return pull, stiff, pull_across, mixed, stiff_across


@triton.jit(do_not_specialize=["start"])
def _sweep_block(
    gradient, moved, change, hessian, levels, turned, turned_across, d, dmin, scale_codes, min_codes, empty, grown,
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
    turned += at * rows
    turned_across += at * rows
    scales = start // N * rows + row  # of the first sub-block
    zero = tl.zeros((R,), dtype=tl.float32)
    total = tl.load(grown + row, mask=real, other=0.0)
    d_before, d_step, d_row = zero, zero, zero
    dmin_before, dmin_step, dmin_row = zero, zero, zero

    if SCALED:
        pull, stiff, pull_across, mixed, stiff_across = _super_block(
            gradient, levels, turned, turned_across, scale_codes + scales, min_codes + scales, row, rows,
            AFFINE, BLOCK, N, R,
        )  # fmt: skip
        floats = start // BLOCK * rows + row
        d_before = tl.load(d + floats, mask=real, other=0.0)
        if AFFINE:
            dmin_before = tl.load(dmin + floats, mask=real, other=0.0)
        # threads hold copies of what belongs to a row: all must have read before one writes, here and below
        tl.debug_barrier()
        d_step, dmin_step, fallen = move_floats(
            d_before, dmin_before, pull, stiff, pull_across, mixed, stiff_across, AFFINE
        )
        total += fallen
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
            minimum_before, minimum, mc = zero, zero, zero
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
        tl.debug_barrier()

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
            step, step_min = move_integers(
                sc, mc, blank, code_low, code_high, pull, stiff, pull_across, mixed, stiff_across, AFFINE
            )
            scale, minimum = d_row * (sc + step), dmin_row * (mc + step_min)
            tl.store(scale_codes + scales + s * rows, sc + step, mask=real)
            if AFFINE:
                tl.store(min_codes + scales + s * rows, mc + step_min, mask=real)
        else:
            step, step_min, _ = move_floats(scale, minimum, pull, stiff, pull_across, mixed, stiff_across, AFFINE)
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
        tl.store(change + place, after - stored, mask=inside)
        tl.debug_barrier()
    tl.store(grown + row, total, mask=real)
