"""The Hessian of a layer's inputs, factored once for all that second-order rounding asks of it.

The column loop wants the upper Cholesky factor U of the inverse, H^-1 = U^T U, and so do targets that make up for the quantized
prefix, which are products with H^-1. With the columns taken backwards H = L L^T, and L^-1, turned back, is U: one factorization
and one triangular inverse, in one matrix. Cholesky, inverse and Cholesky again, as the GPTQ paper has it, cost more than twice
the operations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.core.errors import CalibrationError
from lowbit.core.statistics import blocks_above_diagonal

_DAMP_RETRIES = 4
# triangles of this width are inverted by substitution, larger ones from their parts
_SMALL = 512
# rows that are exchanged at a time
_ROWS = 64


@dataclass(frozen=True)
class Factor:
    """upper: [in, in] float32, Cholesky factor of the damped Hessian's inverse, with its columns in the order of rounding.
    order: [in] int64, that order. damp: what was added to the Hessian's diagonal.
    cost: [in], in the columns' own order: what a unit of squared error in a column costs once the columns after it have made
    up for it.
    """

    upper: Tensor
    order: Tensor
    damp: float
    cost: Tensor

    def times_inverse(self, left: Tensor) -> Tensor:
        """left [rows, in] times the inverse of the damped Hessian, columns in their own order."""
        ordered = left[:, self.order]
        half = torch.empty_like(ordered)
        # in blocks, without those that are zero
        blocks = blocks_above_diagonal(len(self.order))
        for rows, rest in blocks:
            torch.mm(ordered[:, rest], self.upper[rows, rest].T, out=half[:, rows])
        for columns, _ in blocks:
            torch.mm(half[:, : columns.stop], self.upper[: columns.stop, columns], out=ordered[:, columns])
        return left.index_copy(1, self.order, ordered)


def factor(hessian: Tensor, order: Tensor, damp: float) -> Factor:
    """Factor hessian [in, in] float32 + damp I; `damp` grows tenfold on each failure. Raises CalibrationError in the end."""
    backwards = order.flip(0)
    for retry in range(_DAMP_RETRIES):
        raised = damp * 10**retry
        # one matrix is overwritten throughout: at a 7B's down projection each copy is half a GiB
        matrix = hessian[backwards[:, None], backwards]
        matrix.diagonal().add_(raised)
        failed = torch.empty((), dtype=torch.int32, device=matrix.device)
        # seen from its transpose the matrix is in LAPACK's own order, so that no copy is made of it
        torch.linalg.cholesky_ex(matrix.mT, upper=True, out=(matrix.mT, failed))
        if ((failed == 0) & torch.isfinite(matrix.diagonal()).all()).item():
            invert_lower_(matrix)
            turn_(matrix)
            in_order = matrix.diagonal().square().reciprocal()
            return Factor(matrix, order, raised, torch.empty_like(in_order).index_copy_(0, order, in_order))
    raise CalibrationError(
        "the Hessian of a layer's inputs could not be factored, even damped by 10 times its mean diagonal",
        hint="calibrate on other or more text (--dataset, --num-samples), or use --method rtn (GGUF: --refine imatrix)",
    )


def invert_lower_(matrix: Tensor) -> None:
    """Invert a lower triangular matrix [n, n] in place:  [A 0; B C]^-1 = [A^-1 0; -C^-1 B A^-1 C^-1]."""
    if len(matrix) <= _SMALL:
        identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
        matrix.copy_(torch.linalg.solve_triangular(matrix, identity, upper=False))
        return
    half = len(matrix) // 2
    first, below, last = matrix[:half, :half], matrix[half:, :half], matrix[half:, half:]
    invert_lower_(first)
    invert_lower_(last)
    # in blocks, without those that are zero
    product = torch.empty_like(below)
    for rows, _ in blocks_above_diagonal(len(last)):
        torch.mm(last[rows, : rows.stop], below[: rows.stop], out=product[rows])
    for columns, rest in blocks_above_diagonal(half):
        torch.mm(product[:, rest], first[rest, columns], out=below[:, columns])
    below.neg_()


def turn_(matrix: Tensor) -> None:
    """Reverse the order of rows and of columns of a matrix [n, n] in place."""
    middle = len(matrix) // 2
    for start in range(0, middle, _ROWS):
        stop = min(start + _ROWS, middle)
        top, bottom = matrix[start:stop], matrix[len(matrix) - stop : len(matrix) - start]
        turned = top.flip(0, 1)
        top.copy_(bottom.flip(0, 1))
        bottom.copy_(turned)
    if len(matrix) % 2:
        matrix[middle] = matrix[middle].flip(0)
