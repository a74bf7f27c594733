"""The systems that scales are fitted from (refine.py), as one GPU kernel: of every row and pair of groups one number.

As products with the Hessian, group by group, they write and read the whole matrix several times for each group, and only a
sum over a group's columns is wanted of that.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# columns of a group; rows of a program, columns that it multiplies at a time: little enough for any GPU's shared memory
SIZES = (16, 32, 64, 128)
_ROWS, _DEPTH = 64, 32


@triton.jit
def _systems(
    offsets, stride, hessian, down, systems, rows, count, SIZE: tl.constexpr, R: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    row, group = tl.program_id(0) * R + tl.arange(0, R), tl.program_id(1)
    real, near, deep = row < rows, tl.arange(0, SIZE), tl.arange(0, DEPTH)
    line = offsets + row[:, None].to(tl.int64) * stride
    own = line + group * SIZE + deep[None, :]
    theirs = line + group * SIZE + near[None, :]
    # the Hessian is symmetric: its block is read the way matrix units want their second operand
    block = hessian + group * SIZE + deep[:, None] + (group * SIZE + near)[None, :].to(tl.int64) * down
    system = systems + row.to(tl.int64) * count * count
    for other in range(group, count):
        given = tl.zeros((R, SIZE), dtype=tl.float32)
        for k in range(0, SIZE, DEPTH):
            # offsets are small whole numbers: exact in TF32
            left = tl.load(own + k, mask=real[:, None], other=0.0)
            given += tl.dot(left, tl.load(block + k), input_precision="tf32")
        found = tl.sum(given * tl.load(theirs, mask=real[:, None], other=0.0), axis=1)
        tl.store(system + group * count + other, found, mask=real)
        tl.store(system + other * count + group, found, mask=real)
        block += SIZE * down
        theirs += SIZE


def scale_systems(offsets: Tensor, hessian: Tensor, count: int) -> Tensor:
    """refine.scale_systems, for groups of `SIZES` columns."""
    rows, columns = offsets.shape
    systems = offsets.new_empty(rows, count, count)
    offsets, hessian = offsets.contiguous(), hessian.contiguous()
    _systems[(triton.cdiv(rows, _ROWS), count)](
        offsets, columns, hessian, columns, systems, rows, count,
        SIZE=columns // count, R=_ROWS, DEPTH=min(_DEPTH, columns // count), num_warps=4, num_stages=2,
    )  # fmt: skip
    return systems
