"""Lower the layer's output error further once codes exist: the same quadratic, (w - q) H (w - q)^T for every row, seen from
the scales (a small linear system) and from the codes (coordinate descent)."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.core.primitives import Grid, stored_scale
from lowbit.methods.columns import descend


def output_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> Tensor:
    """[out]: (w - q) H (w - q)^T of every row, the mean squared output error of each output channel."""
    residual = weight - quantized
    return ((residual @ hessian) * residual).sum(1)


def fit_scales(
    weight: Tensor, codes: Tensor, grid: Grid, groups: Tensor, hessian: Tensor, scale_dtype: torch.dtype
) -> Tensor:
    """Scales [out, groups] that minimize the output error for fixed codes; rows that would not gain keep theirs.

    A row's quantized weights are linear in its scales, q = A s with A [in, groups] holding code - zero, so the minimum
    solves (A^T H A) s = A^T H w: one small symmetric system a row.
    """
    offsets = codes - grid.zero[:, groups]
    count = grid.scale.shape[1]
    member = torch.nn.functional.one_hot(groups, count).to(weight.dtype)  # [in, groups]
    right = (offsets * (weight @ hessian)) @ member
    system = torch.empty(weight.shape[0], count, count, device=weight.device)
    for group in range(count):
        columns = (groups == group).nonzero().squeeze(1)
        system[:, group] = ((offsets[:, columns] @ hessian[columns]) * offsets) @ member
    ridge = 1e-6 * system.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
    system.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    # the ridge pulls towards the present scales, so a group of zero codes keeps its scale
    solution, failed = torch.linalg.solve_ex(system, right + ridge[:, None] * grid.scale)
    fitted = stored_scale(solution, scale_dtype)
    before = output_error(weight, offsets * grid.scale[:, groups], hessian)
    after = output_error(weight, offsets * fitted[:, groups], hessian)
    gains = (after < before) & (failed == 0)
    return torch.where(gains[:, None], fitted, grid.scale)


def descend_codes(
    weight: Tensor, codes: Tensor, grid: Grid, groups: Tensor, hessian: Tensor, max_code: int, block: int = 128
) -> Tensor:
    """One sweep of coordinate descent: each column's codes move to the best value given all others; never worse.

    codes: [out, in] float32 whole numbers; returns new ones. Blocks of columns share one product with the Hessian.
    """
    codes = codes.clone()
    residual = weight - (codes - grid.zero[:, groups]) * grid.scale[:, groups]
    for start in range(0, weight.shape[1], block):
        stop = min(start + block, weight.shape[1])
        members = groups[start:stop]
        scale, zero = grid.scale[:, members], grid.zero[:, members]
        gradient = residual @ hessian[:, start:stop]
        own = codes[:, start:stop]
        own.copy_(descend(gradient, hessian[start:stop, start:stop], scale, zero, own, max_code))
        residual[:, start:stop] = weight[:, start:stop] - (own - zero) * scale
    return codes
