"""The weight each element has in a block's scale search, when an importance matrix is given."""

from __future__ import annotations

from torch import Tensor

from lowbit.methods.kquants.arithmetic import divide, exact_sqrt_, sequential_sum
from lowbit.methods.kquants.grid import spread_importance


def super_block_weights(x: Tensor, importance: Tensor, rows: int, per_super: int, factor: float) -> Tensor:
    """`importance * sqrt(sigma2 + x*x)`, sigma2 = factor * mean of x*x over the super-block; laid out as `x` `[n, B]`.

    Source: the quantize_row_*_K_impl functions of llama.cpp, ggml/src/ggml-quants.c.
    """
    n, columns = x.shape
    squares = x * x
    in_order = squares.view(n, per_super, -1).transpose(0, 1).reshape(n * per_super, -1)
    sigma2 = divide(sequential_sum(in_order) * factor, float(n * per_super))
    per_element = exact_sqrt_(squares.view(n, per_super, -1).add_(sigma2)).view(n, columns)
    return per_element.mul_(spread_importance(importance, rows, n, per_super))


def row_weights(weights: Tensor, importance: Tensor) -> Tensor:
    """`importance * sqrt(sigma2 + w*w)` with sigma2 the mean of w*w over the whole row; `[rows, cols]`.

    Source: quantize_row_q4_0_impl and its like in llama.cpp, ggml/src/ggml-quants.c.
    """
    squares = weights * weights
    sigma2 = divide(sequential_sum(squares.T.contiguous()), float(weights.shape[1]))
    return exact_sqrt_(squares.add_(sigma2.unsqueeze(1))).mul_(importance)
