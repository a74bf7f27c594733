"""The Hessian of a layer's inputs, factored once for all matrices that read them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.core.statistics import tensor_float32_products
from lowbit.methods.hessian import Factor
from lowbit.methods.hessian import factor as factor_hessian


@dataclass(frozen=True)
class Curvature:
    """What a second-order method needs of the inputs of a linear layer, all float32 on one device.

    hessian: [in, in], mean of x x^T, damped. factored: its factor, columns by falling input power.
    """

    hessian: Tensor
    factored: Factor


def factor_gram(gram: Tensor, damping: float = 0.03) -> Curvature:
    """Curvature of the Gram matrix `gram` [in, in] float32 (a mean over tokens); `damping` is the share of its mean
    diagonal that is added to the diagonal, ten times more on each failed factorization. `gram` is left as it is.

    Channels that calibration never saw get the mean diagonal, so that their weights round to nearest.
    Raises CalibrationError when the matrix cannot be factored.
    """
    hessian = gram.clone()
    diagonal = hessian.diagonal()
    mean = diagonal.mean().clamp_min(1e-12)
    diagonal[diagonal <= 0] = mean
    factored = factor_hessian(hessian, torch.argsort(diagonal, descending=True, stable=True), damping * mean.item())
    diagonal.add_(factored.damp)
    return Curvature(hessian, factored)


def toward_original(weights: Tensor, curvature: Curvature, cross: Tensor, share: float) -> Tensor:
    """Weights [out, in] that turn the inputs X that arrive into the outputs that `weights` give on the original inputs X0:
    W + share * W (X0 - X) X^T H^-1, with `cross` [in, in] the mean of (x0 - x) x^T (GPTAQ, Li et al. 2025)."""
    # of a correction that is small beside the weights 11 significant bits are enough (docs/performance.md)
    with tensor_float32_products(weights.device):
        correction = curvature.factored.times_inverse(weights @ cross)
    return correction.mul_(share).add_(weights)
