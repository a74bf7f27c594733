"""The loops that go column by column within one block of columns: plain PyTorch here, one kernel launch on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lowbit.core.primitives import Grid
from lowbit.methods.compiling import available

# a column's number and its weights in steps of their scales -> what is kept of it, and the step that stands for it
Nearest = Callable[[int, Tensor], tuple[Tensor, Tensor]]
# columns that see each other's errors one by one; those further on get them together, as a matrix product
_NEAR = 32
# columns of a block, on a CPU and on a GPU: there every block is two launches, which few rows hardly take longer than
_BLOCK, _GPU_BLOCK, _FEW_ROWS_BLOCK, _FEW_ROWS = 128, 256, 512, 3072


def block_width(matrix: Tensor) -> int:
    """How many columns of a matrix [out, in] the loops below best take at once."""
    if not matrix.is_cuda:
        return _BLOCK
    return _FEW_ROWS_BLOCK if len(matrix) <= _FEW_ROWS else _GPU_BLOCK


def compensate(weight: Tensor, factor: Tensor, grid: Grid, groups: Tensor, max_code: int) -> tuple[Tensor, Tensor]:
    """GPTQ within a block: round a column, spread its error over the columns after it, take the next.

    weight: [out, n] float32. factor: [n, n], that part of the upper Cholesky factor of the inverse Hessian. groups: [n], each
    column's place in the grid. Returns codes [out, n] as float32 and the errors [out, n] that columns beyond the block have
    to make up for.
    """
    if weight.is_cuda:
        from lowbit.methods import kernels

        return kernels.compensate(weight, factor, grid, groups, max_code)
    scale, zero = grid.scale[:, groups], grid.zero[:, groups]
    if available():
        from lowbit.methods import cpu_kernels

        return cpu_kernels.compensate(weight, factor, scale, zero, max_code)
    zeros = zero.T.contiguous()

    def nearest(j: int, quotient: Tensor) -> tuple[Tensor, Tensor]:
        code = quotient.add_(zeros[j]).round_().clamp_(0, max_code)
        return code, code - zeros[j]

    return _compensate(weight, factor, scale, nearest)


def compensate_on_levels(weight: Tensor, factor: Tensor, scale: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """`compensate` for codes that stand for `levels` [n], ascending; scale: [out, n] float32. Returns levels instead of codes.
    In PyTorch everywhere: a column is seven launches on a GPU, of which a model of 7B has a million columns' worth."""
    middles = (levels[1:] + levels[:-1]) / 2

    def nearest(j: int, quotient: Tensor) -> tuple[Tensor, Tensor]:
        level = levels[torch.bucketize(quotient, middles)]
        return level, level

    return _compensate(weight, factor, scale, nearest)


def _compensate(weight: Tensor, factor: Tensor, scale: Tensor, nearest: Nearest) -> tuple[Tensor, Tensor]:
    # transposed: a column is one contiguous row
    columns, scales = weight.T.contiguous(), scale.T.contiguous()
    kept, errors = torch.empty_like(columns), torch.empty_like(columns)
    strength = factor.diagonal().reciprocal().tolist()
    for start in range(0, len(columns), _NEAR):
        stop = min(start + _NEAR, len(columns))
        for j in range(start, stop):
            kept[j], level = nearest(j, columns[j] / scales[j])
            error = torch.addcmul(columns[j], level, scales[j], value=-1, out=errors[j]).mul_(strength[j])
            columns[j + 1 : stop].addr_(factor[j, j + 1 : stop], error, alpha=-1)
        columns[stop:].addmm_(factor[start:stop, stop:].T, errors[start:stop], alpha=-1)
    return kept.T, errors.T


def descend_(gradient: Tensor, hessian: Tensor, grid: Grid, groups: Tensor, codes: Tensor, max_code: int) -> Tensor:
    """Coordinate descent within a block: each column's codes go to their best value given all others, in place.

    gradient: [out, n], residual times Hessian. hessian: [n, n], the block's own part. groups: [n], as above. codes: [out, n]
    float32. Returns what was added to the residual [out, n].
    """
    if gradient.is_cuda:
        from lowbit.methods import kernels

        return kernels.descend_(gradient, hessian, grid, groups, codes, max_code)
    scale, zero = grid.scale[:, groups], grid.zero[:, groups]
    if available():
        from lowbit.methods import cpu_kernels

        return cpu_kernels.descend_(gradient, hessian, scale, zero, codes, max_code)
    slopes, scales, zeros, columns = (tensor.T.contiguous() for tensor in (gradient, scale, zero, codes))
    inverse_power = hessian.diagonal().reciprocal().tolist()
    moved = torch.empty_like(columns)
    for start in range(0, len(columns), _NEAR):
        stop = min(start + _NEAR, len(columns))
        for j in range(start, stop):
            own, change = columns[j], moved[j]
            torch.sub(own, zeros[j], out=change).mul_(scales[j]).add_(slopes[j], alpha=inverse_power[j])
            change.div_(scales[j]).add_(zeros[j]).round_().clamp_(0, max_code)
            before = own.clone()
            own.copy_(change)
            torch.sub(before, change, out=change).mul_(scales[j])
            slopes[j + 1 : stop].addr_(hessian[j, j + 1 : stop], change)
        slopes[stop:].addmm_(hessian[start:stop, stop:].T, moved[start:stop])
    codes.copy_(columns.T)
    return moved.T
