"""The loops that go column by column within one block of columns: plain PyTorch here, one kernel launch on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.core.primitives import to_codes


def compensate(weight: Tensor, factor: Tensor, scale: Tensor, zero: Tensor, max_code: int) -> tuple[Tensor, Tensor]:
    """GPTQ within a block: round a column, spread its error over the columns after it, take the next.

    weight, scale, zero: [out, n] float32. factor: [n, n], that part of the upper Cholesky factor of the inverse Hessian.
    Returns codes [out, n] as float32 and the errors [out, n] that columns beyond the block have to make up for.
    """
    if weight.is_cuda:
        from lowbit.methods import kernels

        return kernels.compensate(weight, factor, scale, zero, max_code)
    # transposed: a column is one contiguous row
    columns, scales, zeros = (tensor.T.contiguous() for tensor in (weight, scale, zero))
    codes, errors = torch.empty_like(columns), torch.empty_like(columns)
    for j in range(len(columns)):
        codes[j] = to_codes(columns[j], scales[j], zeros[j], max_code)
        errors[j] = (columns[j] - scales[j] * (codes[j] - zeros[j])) / factor[j, j]
        columns[j + 1 :].addr_(factor[j, j + 1 :], errors[j], alpha=-1)
    return codes.T, errors.T


def descend(gradient: Tensor, hessian: Tensor, scale: Tensor, zero: Tensor, codes: Tensor, max_code: int) -> Tensor:
    """Coordinate descent within a block: each column's codes go to their best value given all others.

    gradient: [out, n], residual times Hessian. hessian: [n, n], the block's own part. scale, zero, codes: [out, n].
    Returns new codes [out, n].
    """
    if gradient.is_cuda:
        from lowbit.methods import kernels

        return kernels.descend(gradient, hessian, scale, zero, codes, max_code)
    slopes, scales, zeros, columns = (tensor.T.contiguous() for tensor in (gradient, scale, zero, codes))
    power = hessian.diagonal()
    for j in range(len(columns)):
        quantized = (columns[j] - zeros[j]) * scales[j]
        code = to_codes(quantized + slopes[j] / power[j], scales[j], zeros[j], max_code)
        slopes.addr_(hessian[j], (code - columns[j]) * scales[j], alpha=-1)
        columns[j] = code
    return columns.T
