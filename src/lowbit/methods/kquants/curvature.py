"""The Hessian of a layer's inputs, factored once for all matrices that read them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.core.errors import CalibrationError

_DAMP_RETRIES = 4


@dataclass(frozen=True)
class Curvature:
    """What a second-order method needs of the inputs of a linear layer, all float32 on one device.

    hessian: [in, in], mean of x x^T, damped. order: [in] int64, columns by falling input power, the order of rounding.
    factor: [in, in], upper Cholesky factor of the inverse Hessian in that order. cost: [in], in the columns' own order:
    what a unit of squared error in a column costs once the columns after it have made up for it.
    """

    hessian: Tensor
    order: Tensor
    factor: Tensor
    cost: Tensor


def factor_gram(gram: Tensor, damping: float = 0.03) -> Curvature:
    """Curvature of the Gram matrix `gram` [in, in] float32 (a mean over tokens); `damping` is the share of its mean
    diagonal that is added to the diagonal, ten times more on each failed factorization. `gram` is left as it is.

    Channels that calibration never saw get the mean diagonal, so that their weights round to nearest.
    Raises CalibrationError when the matrix cannot be factored.
    """
    hessian = gram.clone()
    diagonal = hessian.diagonal()
    idle = diagonal <= 0
    mean = diagonal.mean().clamp_min(1e-12)
    diagonal[idle] = mean
    order = torch.argsort(diagonal, descending=True, stable=True)
    for retry in range(_DAMP_RETRIES):
        damp = damping * 10**retry * mean
        matrix = hessian[order[:, None], order]
        matrix.diagonal().add_(damp)
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if failed.item():
            continue
        factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed.item() and bool(torch.isfinite(factor).all()):
            hessian.diagonal().add_(damp)
            cost = torch.empty_like(diagonal)
            cost[order] = factor.diagonal().square().reciprocal()
            return Curvature(hessian, order, factor, cost)
    raise CalibrationError(
        "the Hessian of a layer's inputs could not be factored, even damped by 10 times its mean diagonal",
        hint="calibrate on other or more text (--dataset, --num-samples), or use --refine imatrix",
    )


def toward_original(weights: Tensor, curvature: Curvature, cross: Tensor, share: float) -> Tensor:
    """Weights [out, in] that turn the inputs X that arrive into the outputs that `weights` give on the original inputs X0:
    W + share * W (X0 - X) X^T H^-1, with `cross` [in, in] the mean of (x0 - x) x^T (GPTAQ, Li et al. 2025)."""
    correction = weights @ cross
    factor = torch.linalg.cholesky(curvature.hessian)
    torch.linalg.solve_triangular(factor.mT, correction, upper=True, left=False, out=correction)
    torch.linalg.solve_triangular(factor, correction, upper=False, left=False, out=correction)
    return correction.mul_(share).add_(weights)
