"""GPTQ's column loop onto ggml's grids as one GPU kernel launch for each stretch of columns; sweep_kernels.py has the sweeps.

Columns depend on each other, rows do not: a program keeps a few rows with all columns of the stretch in registers and
walks through the columns there. In PyTorch the loop takes about a dozen launches a column. The results are those of
second_order.py but for float32 rounding of sums. Column-major as there: [columns, out].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.methods.kquants.pair_kernels import nearest

_ROWS = 16


@triton.jit
def _compensate(
    weight, factor, stride, scale, minimum, levels, errors, columns, rows, low, high, N: tl.constexpr, R: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * R + tl.arange(0, R)
    column = tl.arange(0, N)
    place = column[:, None] * rows + row[None, :]
    given = column < columns
    inside = given[:, None] & (row < rows)[None, :]
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
        u = tl.load(factor + j * stride + column, mask=given & (column >= j), other=0.0)
        u_jj = tl.sum(tl.where(column == j, u, 0.0), axis=0)
        ratio = tl.where(s_j == 0.0, 0.0, (w_j + m_j) / tl.where(s_j == 0.0, 1.0, s_j))
        level = nearest(ratio, low, high)
        error = (w_j - (s_j * level - m_j)) / tl.where(u_jj == 0.0, 1.0, u_jj)  # 0 only past the last column
        w -= u[:, None] * error[None, :]
        found = tl.where(here, level[None, :], found)
        e = tl.where(here, error[None, :], e)
    tl.store(levels + place, found, mask=inside)
    tl.store(errors + place, e, mask=inside)


def compensate(
    weight: Tensor, factor: Tensor, scale: Tensor, minimum: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """GPTQ's loop within one stretch of columns. weight, scale, minimum: [n, out], contiguous; factor: [n, n], rows any
    stride apart, its upper triangle counts.

    Returns levels and errors [n, out].
    """
    columns, rows = weight.shape
    levels, errors = torch.empty_like(weight), torch.empty_like(weight)
    _compensate[(triton.cdiv(rows, _ROWS),)](
        weight, factor, factor.stride(0), scale, minimum, levels, errors, columns, rows, float(low), float(high),
        N=triton.next_power_of_2(columns), R=_ROWS, num_warps=4,
    )  # fmt: skip
    return levels, errors
