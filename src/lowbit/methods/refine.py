"""Lower the layer's output error further once codes exist: the same quadratic, (w - q) H (w - q)^T for every row, seen from
the scales (a small linear system) and from the codes (coordinate descent)."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.core.primitives import Grid, by_column, stored_scale
from lowbit.core.statistics import tensor_float32_products
from lowbit.methods.columns import block_width, descend_

# columns whose gradients are computed together: a whole number of blocks
_WIDE = 1024


def fit_scales(
    weight: Tensor, codes: Tensor, grid: Grid, groups: Tensor, hessian: Tensor, scale_dtype: torch.dtype
) -> Tensor:
    """Scales [out, groups] that minimize the output error for fixed codes; rows that would not gain keep theirs.

    A row's quantized weights are linear in its scales, q = A s with A [in, groups] holding code - zero. From the present
    scales the best step solves (A^T H A) d = A^T H (w - A s): one small symmetric system a row.
    """
    count = grid.scale.shape[1]
    offsets = codes - by_column(grid.zero, groups)
    residual = torch.addcmul(weight, offsets, by_column(grid.scale, groups), value=-1)
    # here and below: the best scale or code is found as well (docs/performance.md)
    with tensor_float32_products(weight.device):
        slope = residual @ hessian
    by_group = torch.argsort(groups, stable=True)
    if not torch.equal(groups[by_group], groups):  # groups that moved with their columns: put them side by side
        offsets, slope, hessian = offsets[:, by_group], slope[:, by_group], hessian[by_group[:, None], by_group]
    right = _sum_groups(offsets * slope, count)
    system = scale_systems(offsets, hessian, count)
    # a little resistance, so that the scale of a group of zero codes stays
    ridge = 1e-6 * system.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
    damped = system + torch.diag_embed(ridge[:, None].expand(-1, count))
    factor, failed = torch.linalg.cholesky_ex(damped)
    step = torch.cholesky_solve(right[..., None], factor)[..., 0]
    fitted = stored_scale(grid.scale + step.nan_to_num_(), scale_dtype)
    step = fitted - grid.scale
    change = (step * (torch.bmm(system, step[..., None])[..., 0] - 2 * right)).sum(1)
    gains = (change < 0) & (failed == 0)
    return torch.where(gains[:, None], fitted, grid.scale)


def scale_systems(offsets: Tensor, hessian: Tensor, count: int) -> Tensor:
    """[out, groups, groups]: A^T H A of every row, for groups of consecutive columns; offsets: [out, in]."""
    size = offsets.shape[1] // count
    if offsets.is_cuda:
        from lowbit.methods import scale_kernels

        if size in scale_kernels.SIZES:
            return scale_kernels.scale_systems(offsets, hessian, count)
    systems = offsets.new_empty(len(offsets), count, count)
    with tensor_float32_products(offsets.device):  # offsets are small whole numbers: exact as they are
        for group in range(count):
            start = group * size
            products = offsets[:, start : start + size] @ hessian[start : start + size, start:]
            systems[:, group, group:] = _sum_groups(products.mul_(offsets[:, start:]), count - group)
            systems[:, group:, group] = systems[:, group, group:]
    return systems


def _sum_groups(values: Tensor, count: int) -> Tensor:
    """[out, in] -> [out, groups]."""
    return values.view(len(values), count, -1).sum(2)


def descend_codes(
    weight: Tensor, codes: Tensor, grid: Grid, groups: Tensor, hessian: Tensor, max_code: int, block: int | None = None
) -> Tensor:
    """One sweep of coordinate descent: each column's codes move to the best value given all others; never worse.

    codes: [out, in] float32 whole numbers; returns new ones. Blocks of columns share one product with the Hessian; what a
    block changes reaches the gradient of the others beside it in a product of its own, so that the large one is wide.
    """
    codes, block = codes.clone(), block or block_width(weight)
    wide = max(1, _WIDE // block) * block
    residual = torch.addcmul(weight, codes - by_column(grid.zero, groups), by_column(grid.scale, groups), value=-1)
    for first in range(0, weight.shape[1], wide):
        last = min(first + wide, weight.shape[1])
        with tensor_float32_products(weight.device):
            gradients = residual @ hessian[:, first:last]
        for start in range(first, last, block):
            stop = min(start + block, last)
            gradient, here = gradients[:, start - first : stop - first], slice(start, stop)
            moved = descend_(gradient, hessian[here, here], grid, groups[here], codes[:, here], max_code)
            residual[:, here] += moved
            with tensor_float32_products(weight.device):
                gradients[:, stop - first :].addmm_(moved, hessian[here, stop:last])
    return codes
