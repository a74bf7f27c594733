"""The sequential column loops of GPTQ and of coordinate descent, as one GPU kernel launch for each block of columns.

A column's codes decide what the columns after it look like, so the loop cannot be vectorized over columns; but rows are
independent. Each program keeps a tile of rows with all columns of the block in registers and walks through the columns
there. In PyTorch the same loop takes about eight launches a column, and a 7B model has 700,000 columns. Parts of matrices are
read and written where they lie: on half of a model's rows, copies and gathers would take longer than the loop.

The results are those of the PyTorch loops in columns.py but for float32 rounding of sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from lowbit.core.primitives import Grid

_ROWS = 16


@triton.jit
def _compensate(  # type: ignore[no-untyped-def]  # Triton's
    weight, factor, scale, zero, group, codes, errors, rows, columns, weight_stride, factor_stride, groups, max_code,
    N: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    column = tl.arange(0, N)
    within = column < columns
    inside = (row < rows)[:, None] & within[None, :]
    w = tl.load(weight + row[:, None] * weight_stride + column[None, :], mask=inside, other=0.0)
    own = tl.load(group + column, mask=within, other=0)
    s = tl.load(scale + row[:, None] * groups + own[None, :], mask=inside, other=1.0)
    z = tl.load(zero + row[:, None] * groups + own[None, :], mask=inside, other=0.0)
    c = tl.zeros((R, N), dtype=tl.float32)
    e = tl.zeros((R, N), dtype=tl.float32)
    for j in range(columns):
        here = (column == j)[None, :]
        w_j = tl.sum(tl.where(here, w, 0.0), axis=1)
        s_j = tl.sum(tl.where(here, s, 0.0), axis=1)
        z_j = tl.sum(tl.where(here, z, 0.0), axis=1)
        u = tl.load(factor + j * factor_stride + column, mask=within, other=0.0)  # zero before the diagonal
        u_jj = tl.sum(tl.where(column == j, u, 0.0), axis=0)
        code = tl.minimum(tl.maximum(libdevice.rint(w_j / s_j + z_j), 0.0), max_code)
        error = (w_j - s_j * (code - z_j)) / u_jj
        w -= error[:, None] * u[None, :]
        c = tl.where(here, code[:, None], c)
        e = tl.where(here, error[:, None], e)
    place = row[:, None] * columns + column[None, :]
    tl.store(codes + place, c, mask=inside)
    tl.store(errors + place, e, mask=inside)


@triton.jit
def _descend(  # type: ignore[no-untyped-def]  # Triton's
    gradient, hessian, scale, zero, group, codes, moved, rows, columns, gradient_stride, hessian_stride, codes_stride,
    groups, max_code, N: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    column = tl.arange(0, N)
    within = column < columns
    inside = (row < rows)[:, None] & within[None, :]
    g = tl.load(gradient + row[:, None] * gradient_stride + column[None, :], mask=inside, other=0.0)
    own = tl.load(group + column, mask=within, other=0)
    s = tl.load(scale + row[:, None] * groups + own[None, :], mask=inside, other=1.0)
    z = tl.load(zero + row[:, None] * groups + own[None, :], mask=inside, other=0.0)
    place = codes + row[:, None] * codes_stride + column[None, :]
    before = tl.load(place, mask=inside, other=0.0)
    c = before
    for j in range(columns):
        here = (column == j)[None, :]
        g_j = tl.sum(tl.where(here, g, 0.0), axis=1)
        s_j = tl.sum(tl.where(here, s, 0.0), axis=1)
        z_j = tl.sum(tl.where(here, z, 0.0), axis=1)
        c_j = tl.sum(tl.where(here, c, 0.0), axis=1)
        h = tl.load(hessian + j * hessian_stride + column, mask=within, other=0.0)
        h_jj = tl.sum(tl.where(column == j, h, 0.0), axis=0)
        code = libdevice.rint(((c_j - z_j) * s_j + g_j / h_jj) / s_j + z_j)
        code = tl.minimum(tl.maximum(code, 0.0), max_code)
        g -= ((code - c_j) * s_j)[:, None] * h[None, :]
        c = tl.where(here, code[:, None], c)
    tl.store(place, c, mask=inside)
    tl.store(moved + row[:, None] * columns + column[None, :], (before - c) * s, mask=inside)


def compensate(weight: Tensor, factor: Tensor, grid: Grid, groups: Tensor, max_code: int) -> tuple[Tensor, Tensor]:
    """columns.compensate; `weight` and `factor` may be parts of larger matrices."""
    rows, columns = weight.shape
    codes, errors = torch.empty(2, rows, columns, device=weight.device)
    scale, zero = grid.scale.contiguous(), grid.zero.contiguous()
    _compensate[(triton.cdiv(rows, _ROWS),)](
        weight, factor, scale, zero, groups, codes, errors, rows, columns,
        _row_stride(weight), _row_stride(factor), scale.shape[1], float(max_code),
        N=triton.next_power_of_2(columns), R=_ROWS, num_warps=4,
    )  # fmt: skip
    return codes, errors


def descend_(gradient: Tensor, hessian: Tensor, grid: Grid, groups: Tensor, codes: Tensor, max_code: int) -> Tensor:
    """columns.descend_; all may be parts of larger matrices."""
    rows, columns = gradient.shape
    moved = torch.empty(rows, columns, device=gradient.device)
    scale, zero = grid.scale.contiguous(), grid.zero.contiguous()
    _descend[(triton.cdiv(rows, _ROWS),)](
        gradient, hessian, scale, zero, groups, codes, moved, rows, columns,
        _row_stride(gradient), _row_stride(hessian), _row_stride(codes), scale.shape[1], float(max_code),
        N=triton.next_power_of_2(columns), R=_ROWS, num_warps=4,
    )  # fmt: skip
    return moved


def _row_stride(matrix: Tensor) -> int:
    """Elements from one row to the next; a row's own lie side by side."""
    assert matrix.stride(1) == 1 or matrix.shape[1] == 1
    return matrix.stride(0)
