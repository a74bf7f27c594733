"""The Hessian of a layer's inputs, factored once for all that second-order rounding asks of it.

The column loop wants the upper Cholesky factor U of the inverse, H^-1 = U^T U, and so do targets that make up for the quantized
prefix, which are products with H^-1. With the columns taken backwards H = L L^T, and L^-1, turned back, is U: one factorization
and one triangular inverse, in one matrix. Cholesky, inverse and Cholesky again, as the GPTQ paper has it, cost more than twice
the operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.core.distributed import ALONE, World
from lowbit.core.errors import CalibrationError
from lowbit.core.statistics import blocks_above_diagonal

_DAMP_RETRIES = 4
# triangles of this width are inverted by substitution, larger ones from their parts
_SMALL = 512
# rows that are exchanged at a time
_ROWS = 1024
# columns that one process works on at a time, and from how many on processes share the work
_WIDTH, _SHARED = 512, 2048


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

    def cost_in_text(self) -> Tensor:
        """[in], in the columns' own order: `cost` without what damping adds to it. An error in a column ends as that error
        times its row of the factor over the row's diagonal, spread over the columns after it."""
        own = self.upper.diagonal().square()
        spread = self.upper.square().sum(1).div_(own)
        in_order = own.reciprocal().sub_(spread, alpha=self.damp).clamp_min_(0)
        return torch.empty_like(in_order).index_copy_(0, self.order, in_order)

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


def factor(hessian: Tensor, order: Tensor, damp: float, world: World = ALONE) -> Factor:
    """Factor hessian [in, in] float32 + damp I; `damp` grows tenfold on each failure. Raises CalibrationError in the end.

    world: processes that call this with the same matrix, and share the work where it is large.
    """
    backwards, share = order.flip(0), world.size > 1 and len(order) >= _SHARED
    for retry in range(_DAMP_RETRIES):
        raised = damp * 10**retry
        # one matrix is overwritten throughout: at a 7B's down projection each copy is half a GiB
        matrix = hessian[backwards[:, None], backwards]
        matrix.diagonal().add_(raised)
        positive = shared_inverse_factor_(matrix, world, _WIDTH) if share else _inverse_factor_(matrix)
        if positive:
            turn_(matrix)
            in_order = matrix.diagonal().square().reciprocal()
            return Factor(matrix, order, raised, torch.empty_like(in_order).index_copy_(0, order, in_order))
    raise CalibrationError(
        "the Hessian of a layer's inputs could not be factored, even damped by 10 times its mean diagonal",
        hint="calibrate on other or more text (--dataset, --num-samples), or use --method rtn (GGUF: --refine imatrix)",
    )


def _inverse_factor_(matrix: Tensor) -> bool:
    """Replace a symmetric matrix [n, n] by L^-1, where it is L L^T. Returns whether it was positive definite."""
    failed = torch.empty((), dtype=torch.int32, device=matrix.device)
    # seen from its transpose the matrix is in LAPACK's own order, so that no copy is made of it
    torch.linalg.cholesky_ex(matrix.mT, upper=True, out=(matrix.mT, failed))
    if not ((failed == 0) & torch.isfinite(matrix.diagonal()).all()).item():
        return False
    invert_lower_(matrix)
    return True


def shared_inverse_factor_(matrix: Tensor, world: World, width: int) -> bool:
    """The same by several processes: each has every so manieth block of `width` columns, of what is left of the matrix and of
    L^-1, and whoever has the block in turn tells the others that column of L, while they still work with the one before.

    L^-1 comes row by row: X_kj = -L_kk^-1 sum_m L_km X_mj (j < k), the sums growing with every column of L (m < k).
    """
    size = len(matrix)
    blocks = [slice(start, min(start + width, size)) for start in range(0, size, width)]
    owned = [blocks[rank :: world.size] for rank in range(world.size)]
    columns = [sum(block.stop - block.start for block in one) for one in owned]
    inverse = matrix.new_zeros(size, columns[world.rank])  # this process's columns, side by side
    reached = 0  # of them, those that begin at or above the diagonal's present place
    arriving = _Column(matrix, blocks[0], 0, world)
    for number, here in enumerate(blocks):
        column = arriving.arrived()
        left = [block for block in owned[world.rank] if block.start > here.start]
        if number + 1 < len(blocks):
            owner = (number + 1) % world.size
            if owner == world.rank:  # all wait for the next block's column: it comes before everything else
                _take_from_(matrix, left.pop(0), column, here)
            arriving = _Column(matrix, blocks[number + 1], owner, world)
        wide = here.stop - here.start
        corner, below = column[:wide], column[wide:]
        inverse[here, :reached] = torch.mm(corner, inverse[here, :reached]).neg_()
        if number % world.size == world.rank:
            inverse[here, reached : reached + wide] = corner
            reached += wide
        inverse[here.stop :, :reached].addmm_(below, inverse[here, :reached])
        for later in left:
            _take_from_(matrix, later, column, here)
    _gather_columns(matrix, inverse, owned, columns, world)
    return bool(torch.isfinite(matrix.diagonal()).all().item())


class _Column:
    """A block of columns of L on its way from the process that has it to all others [n, wide]: `_fill_column`'s."""

    def __init__(self, matrix: Tensor, here: slice, owner: int, world: World) -> None:
        self._column = matrix.new_empty(len(matrix) - here.start, here.stop - here.start)
        if owner == world.rank:
            _fill_column(self._column, matrix, here)
        self._wait = world.begin_same_(self._column, owner)

    def arrived(self) -> Tensor:
        self._wait()
        return self._column


def _take_from_(matrix: Tensor, later: slice, column: Tensor, here: slice) -> None:
    """Take the part of a column of L from what is left of a later block of the matrix's columns."""
    rows = column[later.start - here.start :]
    matrix[later.start :, later].addmm_(rows, rows[: later.stop - later.start].T, alpha=-1)


def _fill_column(column: Tensor, matrix: Tensor, here: slice) -> None:
    """A block of columns of L from the diagonal down [n, wide]; on top L_kk^-1 instead of L_kk, NaN if there is none."""
    wide = here.stop - here.start
    corner, failed = torch.linalg.cholesky_ex(matrix[here, here])
    invert_lower_(corner)
    column[:wide] = torch.where(failed == 0, corner, torch.nan)
    torch.mm(matrix[here.stop :, here], column[:wide].T, out=column[wide:])


def _gather_columns(
    matrix: Tensor, own: Tensor, owned: Sequence[Sequence[slice]], columns: Sequence[int], world: World
) -> None:
    """Fill the matrix with the columns that all processes have."""
    size = len(matrix)
    lengths = [size * count for count in columns]
    for blocks, part in zip(owned, torch.split(world.concatenate(own.view(-1), lengths), lengths), strict=True):
        start, part = 0, part.view(size, -1)
        for block in blocks:
            stop = start + block.stop - block.start
            matrix[:, block] = part[:, start:stop]
            start = stop


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
