"""The sequential column loops of GPTQ and of coordinate descent, as one GPU kernel launch for each block of columns.

A column's codes decide what the columns after it look like, so the loop cannot be vectorized over columns; but rows are
independent. A program is one warp with a few rows, and keeps 32 columns of them at a time in registers: sums over columns
then need no barrier. What the columns before those changed is asked for as a product when their turn comes. In PyTorch the
same loop takes about eight launches a column, and a 7B model has 700,000 columns.

The results are those of the PyTorch loops in columns.py but for float32 rounding of sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.core.primitives import Grid

# rows of a program: few where the matrix has few, since then the card has room for more programs, and each ends sooner
_ROWS, _FEW_ROWS, _FEW = 16, 2, 4096
_NEAR = 32


@triton.jit
def _nearest(value, max_code):  # type: ignore[no-untyped-def]  # Triton's
    # a float32 this large has no room for fractions: adding it rounds to the nearest, ties to even
    return tl.minimum(tl.maximum(value, 0.0), max_code) + 12582912.0 - 12582912.0


@triton.jit
def _compensate(  # type: ignore[no-untyped-def]  # Triton's
    weight, stride, factor, down, across, scale, zero, count, groups, codes, errors, rows, width, max_code,
    NEAR: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * R + tl.arange(0, R)
    real = row < rows
    near = tl.arange(0, NEAR)
    for first in range(0, width, NEAR):
        column = first + near
        inside = real[:, None] & (column < width)[None, :]
        w = tl.load(weight + row[:, None].to(tl.int64) * stride + column[None, :], mask=inside, other=0.0)
        for k in range(0, first, NEAR):
            earlier = tl.load(errors + row[:, None] * width + (k + near)[None, :], mask=real[:, None], other=0.0)
            u = tl.load(
                factor + (k + near)[:, None] * down + column[None, :] * across,
                mask=(column < width)[None, :],
                other=0.0,
            )
            w -= tl.dot(earlier, u, input_precision="ieee")
        c = tl.zeros((R, NEAR), dtype=tl.float32)
        e = tl.zeros((R, NEAR), dtype=tl.float32)
        for j in range(NEAR):
            at = tl.minimum(first + j, width - 1)  # what is beyond the width changes nothing
            group = tl.load(groups + at)
            s_j = tl.load(scale + row * count + group, mask=real, other=1.0)
            z_j = tl.load(zero + row * count + group, mask=real, other=0.0)
            line = factor + at * down
            u = tl.load(line + column * across, mask=(near >= j) & (column < width), other=0.0)
            u_jj = tl.load(line + at * across)
            here = (near == j)[None, :]
            w_j = tl.sum(tl.where(here, w, 0.0), axis=1)
            code = _nearest(w_j / s_j + z_j, max_code)
            error = (w_j - s_j * (code - z_j)) / u_jj
            w -= error[:, None] * u[None, :]
            c = tl.where(here, code[:, None], c)
            e = tl.where(here, error[:, None], e)
        place = row[:, None] * width + column[None, :]
        tl.store(codes + place, c, mask=inside)
        tl.store(errors + place, e, mask=inside)
        tl.debug_barrier()  # lanes read what others wrote


@triton.jit
def _descend(  # type: ignore[no-untyped-def]  # Triton's
    gradient, stride, hessian, down, scale, zero, count, groups, codes, beside, moved, rows, width, max_code,
    NEAR: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * R + tl.arange(0, R)
    real = row < rows
    near = tl.arange(0, NEAR)
    for first in range(0, width, NEAR):
        column = first + near
        inside = real[:, None] & (column < width)[None, :]
        g = tl.load(gradient + row[:, None].to(tl.int64) * stride + column[None, :], mask=inside, other=0.0)
        for k in range(0, first, NEAR):
            earlier = tl.load(moved + row[:, None] * width + (k + near)[None, :], mask=real[:, None], other=0.0)
            h = tl.load(
                hessian + (k + near)[:, None] * down + column[None, :], mask=(column < width)[None, :], other=0.0
            )
            g += tl.dot(earlier, h, input_precision="ieee")
        own = codes + row.to(tl.int64) * beside + first
        c = tl.zeros((R, NEAR), dtype=tl.float32)
        m = tl.zeros((R, NEAR), dtype=tl.float32)
        for j in range(NEAR):
            at = tl.minimum(first + j, width - 1)  # what is beyond the width changes nothing
            group = tl.load(groups + at)
            s_j = tl.load(scale + row * count + group, mask=real, other=1.0)
            z_j = tl.load(zero + row * count + group, mask=real, other=0.0)
            line = hessian + at * down
            h = tl.load(line + column, mask=column < width, other=0.0)
            h_jj = tl.load(line + at)
            here = (near == j)[None, :]
            g_j = tl.sum(tl.where(here, g, 0.0), axis=1)
            c_j = tl.load(codes + row.to(tl.int64) * beside + at, mask=real, other=0.0)
            code = _nearest(((c_j - z_j) * s_j + g_j / h_jj) / s_j + z_j, max_code)
            back = (c_j - code) * s_j
            g += back[:, None] * h[None, :]
            c = tl.where(here, code[:, None], c)
            m = tl.where(here, back[:, None], m)
        tl.debug_barrier()  # lanes read what others write, here and below
        tl.store(own[:, None] + near[None, :], c, mask=inside)
        tl.store(moved + row[:, None] * width + column[None, :], m, mask=inside)
        tl.debug_barrier()


@triton.jit
def _nothing():  # type: ignore[no-untyped-def]  # Triton's
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
    moved = gradient.new_empty(rows, width)
    scale, zero = grid.scale.contiguous(), grid.zero.contiguous()
    at_once = _rows_of_program(rows)
    _descend[(triton.cdiv(rows, at_once),)](
        gradient, gradient.stride(0), hessian, hessian.stride(0), scale, zero, scale.shape[1], groups,
        codes, codes.stride(0), moved, rows, width, float(max_code), NEAR=_NEAR, R=at_once, num_warps=1,
    )  # fmt: skip
    return moved
