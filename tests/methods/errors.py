"""What a layer's outputs lose, the plain way."""

from torch import Tensor


def output_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> Tensor:
    """[out]: (w - q) H (w - q)^T of every row."""
    residual = weight - quantized
    return ((residual @ hessian) * residual).sum(1)
