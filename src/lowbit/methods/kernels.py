"""The sequential column loops of GPTQ and of coordinate descent, as one GPU kernel launch for each block of columns.

A column's codes decide what the columns after it look like, so the loop cannot be vectorized over columns; but rows are
independent. A program is one warp with a few rows, and keeps 32 columns of them at a time in registers: sums over columns
then need no barrier. What the columns before those changed is asked for as a product when their turn comes. How long a
column takes is how long its operations wait for each other: what does not depend on the column before is done for all 32
together, divisions among it. In PyTorch the same loop takes about eight launches a column, and a 7B model has 700,000
columns.

The results are those of the PyTorch loops in columns.py but for float32 rounding of sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.core.primitives import Grid

# rows of a program: fewer where the matrix has few, since then the card has room for more programs, and each ends sooner
_ROWS, _FEW_ROWS, _FEW = 16, 8, 8192
_NEAR = 32


@triton.jit
def _nearest(value, max_code):
    # a float32 this large has no room for fractions: adding it rounds to the nearest, ties to even
    return tl.minimum(tl.maximum(value, 0.0), max_code) + 12582912.0 - 12582912.0


@triton.jit
def _compensate(
    weight, stride, factor, down, across, scale, zero, count, groups, codes, errors, rows, width, max_code,
    NEAR: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * R + tl.arange(0, R)
    real = row < rows
    near = tl.arange(0, NEAR)
    for first in range(0, width, NEAR):
        column = first + near
        known = column < width
        inside = real[:, None] & known[None, :]
        w = tl.load(weight + row[:, None].to(tl.int64) * stride + column[None, :], mask=inside, other=0.0)
        for k in range(0, first, NEAR):
            earlier = tl.load(errors + row[:, None] * width + (k + near)[None, :], mask=real[:, None], other=0.0)
            u = tl.load(
                factor + (k + near)[:, None] * down + column[None, :] * across,
                mask=known[None, :],
                other=0.0,
            )
            w -= tl.dot(earlier, u, input_precision="ieee")
        place = row[:, None] * count + tl.load(groups + column, mask=known, other=0)[None, :]
        s = tl.load(scale + place, mask=inside, other=1.0)
        z = tl.load(zero + place, mask=inside, other=0.0)
        diagonal = tl.load(factor + column * down + column * across, mask=known, other=1.0)
        # counted in steps of the grid, nothing is divided on the way from one column to the next
        x, step, strength = w / s + z, 1.0 / s, s / diagonal[None, :]
        for j in range(NEAR):
            # what is beyond the width changes nothing
            line = factor + tl.minimum(first + j, width - 1) * down
            u = tl.load(line + column * across, mask=(near > j) & known, other=0.0)
            here = (near == j)[None, :]
            strength_j = tl.sum(tl.where(here, strength, 0.0), axis=1)
            x_j = tl.sum(tl.where(here, x, 0.0), axis=1)
            error = (x_j - _nearest(x_j, max_code)) * strength_j
            x -= error[:, None] * (u[None, :] * step)  # columns up to this one stay as they were in their turn
        written, code = row[:, None] * width + column[None, :], _nearest(x, max_code)
        tl.store(codes + written, code, mask=inside)
        tl.store(errors + written, (x - code) * strength, mask=inside)
        tl.debug_barrier()  # lanes read what others wrote


@triton.jit
def _descend(
    gradient, stride, hessian, down, scale, count, groups, codes, beside, moved, rows, width, max_code,
    NEAR: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * R + tl.arange(0, R)
    real = row < rows
    near = tl.arange(0, NEAR)
    for first in range(0, width, NEAR):
        column = first + near
        known = column < width
        inside = real[:, None] & known[None, :]
        g = tl.load(gradient + row[:, None].to(tl.int64) * stride + column[None, :], mask=inside, other=0.0)
        for k in range(0, first, NEAR):
            earlier = tl.load(moved + row[:, None] * width + (k + near)[None, :], mask=real[:, None], other=0.0)
            h = tl.load(hessian + (k + near)[:, None] * down + column[None, :], mask=known[None, :], other=0.0)
            g += tl.dot(earlier, h, input_precision="ieee")
        own = codes + row[:, None].to(tl.int64) * beside + column[None, :]
        c = tl.load(own, mask=inside, other=0.0)
        place = row[:, None] * count + tl.load(groups + column, mask=known, other=0)[None, :]
        s = tl.load(scale + place, mask=inside, other=1.0)
        diagonal = tl.load(hessian + column * down + column, mask=known, other=1.0)
        # by how many steps of the grid each weight would move by itself
        step = 1.0 / (diagonal[None, :] * s)
        x = g * step
        for j in range(NEAR):
            # what is beyond the width changes nothing
            line = hessian + tl.minimum(first + j, width - 1) * down
            h = tl.load(line + column, mask=(near > j) & known, other=0.0)
            here = (near == j)[None, :]
            s_j = tl.sum(tl.where(here, s, 0.0), axis=1)
            c_j = tl.sum(tl.where(here, c, 0.0), axis=1)
            x_j = tl.sum(tl.where(here, x, 0.0), axis=1)
            back = (c_j - _nearest(c_j + x_j, max_code)) * s_j
            x += back[:, None] * (h[None, :] * step)  # columns up to this one stay as they were in their turn
        code = _nearest(c + x, max_code)
        tl.debug_barrier()  # lanes read what others write, here and below
        tl.store(own, code, mask=inside)
        tl.store(moved + row[:, None] * width + column[None, :], (c - code) * s, mask=inside)
        tl.debug_barrier()


@triton.jit
def _nothing():
    pass


def load(device: torch.device) -> None:
    """Have Triton read and check itself, half a second before any first kernel, in a thread that has nothing else to do."""
    with torch.cuda.device(device):
        _nothing[(1,)]()


def _rows_of_program(rows: int) -> int:
    return _FEW_ROWS if rows <= _FEW else _ROWS


def compensate(weight: Tensor, factor: Tensor, grid: Grid, groups: Tensor, max_code: int) -> tuple[Tensor, Tensor]:
    """columns.compensate."""
    rows, width = weight.shape
    codes, errors = weight.new_empty(rows, width), weight.new_empty(rows, width)
    scale, zero = grid.scale.contiguous(), grid.zero.contiguous()
    at_once = _rows_of_program(rows)
    _compensate[(triton.cdiv(rows, at_once),)](
        weight, weight.stride(0), factor, *factor.stride(), scale, zero, scale.shape[1], groups,
        codes, errors, rows, width, float(max_code), NEAR=_NEAR, R=at_once, num_warps=1,
    )  # fmt: skip
    return codes, errors


def descend_(gradient: Tensor, hessian: Tensor, grid: Grid, groups: Tensor, codes: Tensor, max_code: int) -> Tensor:
    """columns.descend_."""
    rows, width = gradient.shape
    moved, scale = gradient.new_empty(rows, width), grid.scale.contiguous()
    at_once = _rows_of_program(rows)
    _descend[(triton.cdiv(rows, at_once),)](
        gradient, gradient.stride(0), hessian, hessian.stride(0), scale, scale.shape[1], groups,
        codes, codes.stride(0), moved, rows, width, float(max_code), NEAR=_NEAR, R=at_once, num_warps=1,
    )  # fmt: skip
    return moved
