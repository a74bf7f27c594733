"""The sequential column loops of GPTQ and of coordinate descent, as one GPU kernel launch for each block of columns.

A column's codes decide what the columns after it look like, so the loop cannot be vectorized over columns; but rows are
independent. Each program keeps a tile of rows with all columns of the block in registers and walks through the columns
there. In PyTorch the same loop takes about eight launches a column, and a 7B model has 700,000 columns.

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
def _compensate(weight, factor, scale, zero, codes, errors, rows, max_code, N: tl.constexpr, R: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton's
    row = tl.program_id(0) * R + tl.arange(0, R)
    column = tl.arange(0, N)
    place = row[:, None] * N + column[None, :]
    inside = (row < rows)[:, None]
    w = tl.load(weight + place, mask=inside, other=0.0)
    s = tl.load(scale + place, mask=inside, other=1.0)
    z = tl.load(zero + place, mask=inside, other=0.0)
    c = tl.zeros((R, N), dtype=tl.float32)
    e = tl.zeros((R, N), dtype=tl.float32)
    for j in range(N):
        here = (column == j)[None, :]
        w_j = tl.sum(tl.where(here, w, 0.0), axis=1)
        s_j = tl.sum(tl.where(here, s, 0.0), axis=1)
        z_j = tl.sum(tl.where(here, z, 0.0), axis=1)
        u = tl.load(factor + j * N + column)  # zero before the diagonal
        u_jj = tl.sum(tl.where(column == j, u, 0.0), axis=0)
        code = tl.minimum(tl.maximum(libdevice.rint(w_j / s_j + z_j), 0.0), max_code)
        error = (w_j - s_j * (code - z_j)) / u_jj
        w -= error[:, None] * u[None, :]
        c = tl.where(here, code[:, None], c)
        e = tl.where(here, error[:, None], e)
    tl.store(codes + place, c, mask=inside)
    tl.store(errors + place, e, mask=inside)


@triton.jit
def _descend(gradient, hessian, scale, zero, codes, rows, max_code, N: tl.constexpr, R: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton's
    row = tl.program_id(0) * R + tl.arange(0, R)
    column = tl.arange(0, N)
    place = row[:, None] * N + column[None, :]
    inside = (row < rows)[:, None]
    g = tl.load(gradient + place, mask=inside, other=0.0)
    s = tl.load(scale + place, mask=inside, other=1.0)
    z = tl.load(zero + place, mask=inside, other=0.0)
    c = tl.load(codes + place, mask=inside, other=0.0)
    for j in range(N):
        here = (column == j)[None, :]
        g_j = tl.sum(tl.where(here, g, 0.0), axis=1)
        s_j = tl.sum(tl.where(here, s, 0.0), axis=1)
        z_j = tl.sum(tl.where(here, z, 0.0), axis=1)
        c_j = tl.sum(tl.where(here, c, 0.0), axis=1)
        h = tl.load(hessian + j * N + column)
        h_jj = tl.sum(tl.where(column == j, h, 0.0), axis=0)
        code = libdevice.rint(((c_j - z_j) * s_j + g_j / h_jj) / s_j + z_j)
        code = tl.minimum(tl.maximum(code, 0.0), max_code)
        g -= ((code - c_j) * s_j)[:, None] * h[None, :]
        c = tl.where(here, code[:, None], c)
    tl.store(codes + place, c, mask=inside)


def compensate(weight: Tensor, factor: Tensor, grid: Grid, groups: Tensor, max_code: int) -> tuple[Tensor, Tensor]:
    """columns.compensate."""
    width = triton.next_power_of_2(weight.shape[1])
    given = ((weight, 0.0), (grid.scale[:, groups], 1.0), (grid.zero[:, groups], 0.0))
    padded = [_padded(tensor, width, fill) for tensor, fill in given]
    square = torch.eye(width, device=weight.device)
    square[: weight.shape[1], : weight.shape[1]] = factor.triu()
    codes, errors = torch.empty_like(padded[0]), torch.empty_like(padded[0])
    _compensate[(triton.cdiv(len(weight), _ROWS),)](
        padded[0],
        square,
        padded[1],
        padded[2],
        codes,
        errors,
        len(weight),
        float(max_code),
        N=width,
        R=_ROWS,
        num_warps=4,
    )
    return codes[:, : weight.shape[1]], errors[:, : weight.shape[1]]


def descend_(gradient: Tensor, hessian: Tensor, grid: Grid, groups: Tensor, codes: Tensor, max_code: int) -> Tensor:
    """columns.descend_."""
    width, scale = triton.next_power_of_2(gradient.shape[1]), grid.scale[:, groups]
    given = ((gradient, 0.0), (scale, 1.0), (grid.zero[:, groups], 0.0), (codes, 0.0))
    padded = [_padded(tensor, width, fill) for tensor, fill in given]
    square = torch.eye(width, device=gradient.device)
    square[: gradient.shape[1], : gradient.shape[1]] = hessian
    _descend[(triton.cdiv(len(gradient), _ROWS),)](
        padded[0],
        square,
        padded[1],
        padded[2],
        padded[3],
        len(gradient),
        float(max_code),
        N=width,
        R=_ROWS,
        num_warps=4,
    )
    after = padded[3][:, : gradient.shape[1]]
    moved = (codes - after).mul_(scale)
    codes.copy_(after)
    return moved


def _padded(tensor: Tensor, width: int, fill: float) -> Tensor:
    missing = width - tensor.shape[1]
    return (
        torch.nn.functional.pad(tensor, (0, missing), value=fill).contiguous()
        if missing
        else tensor.contiguous().clone()
    )
