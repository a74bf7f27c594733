"""Q2_K: super-blocks of 16 sub-blocks of 16 weights, 4-bit scales and minimums.

Source: quantize_row_q2_K_ref / _impl in llama.cpp, ggml/src/ggml-quants.c.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.methods.kquants.arithmetic import divide, nearest_int, ratio, sequential_sum, to_half, wrap_uint8
from lowbit.methods.kquants.bits import bytes_half, half_bytes, pack_planes, unpack_planes
from lowbit.methods.kquants.constants import AffineSearch
from lowbit.methods.kquants.grid import (
    Grid,
    element_major,
    patch_codes,
    round_uniform,
    row_major,
    stored,
    zero_scale_columns,
)
from lowbit.methods.kquants.importance import super_block_weights
from lowbit.methods.kquants.search import search_affine, search_positive

SUB_BLOCK, PER_SUPER = 16, 16
TOP, MAX_SCALE_CODE = 3, 15


def choose_q2_k(weights: Tensor, importance: Tensor | None) -> tuple[Grid, Tensor]:
    """ggml's own grid and codes for `weights` `[rows, cols]` float32 and importance `[cols]`."""
    rows = weights.shape[0]
    x = element_major(weights, SUB_BLOCK, PER_SUPER)
    if importance is None:
        fit = search_affine(x, x.abs(), AffineSearch(TOP, -0.5, 0.1, 15, absolute_error=True))
        d, scale_codes = _spread_max(fit.scale.view(PER_SUPER, -1))
        dmin, min_codes = _spread_max(fit.minimum.view(PER_SUPER, -1))
    else:
        w = super_block_weights(x, importance, rows, PER_SUPER, 1.0)
        fit = search_affine(x, w, AffineSearch(TOP, -0.9, 0.05, 36))
        sums = sequential_sum(w).view(PER_SUPER, -1)
        d, scale_codes = search_positive(fit.scale.view(PER_SUPER, -1), sums, MAX_SCALE_CODE)
        dmin, min_codes = search_positive(fit.minimum.view(PER_SUPER, -1), sums, MAX_SCALE_CODE)
    # Both codes share a byte that C builds with `scale | min << 4`: a code out of range spills into the other.
    byte = wrap_uint8(scale_codes) | wrap_uint8(min_codes << 4)
    grid = Grid(
        to_half(d).view(rows, -1),
        to_half(dmin).view(rows, -1),
        row_major((byte & 15).flatten().to(torch.int16), rows, PER_SUPER),
        row_major((byte >> 4).flatten().to(torch.int16), rows, PER_SUPER),
    )
    codes = round_uniform(weights, grid, 0, TOP)
    flat, columns = zero_scale_columns(grid, PER_SUPER)
    return grid, patch_codes(codes, flat, fit.codes(x, TOP, columns))


def _spread_max(values: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of `[16, supers]` values gets code 15, and the others their share of it."""
    largest = values.amax(0).clamp_(min=0.0) + 0.0  # never -0
    codes = nearest_int(ratio(float(MAX_SCALE_CODE), largest) * values).masked_fill_(largest == 0, 0)
    return divide(largest, float(MAX_SCALE_CODE)), codes


def pack_q2_k(grid: Grid, codes: Tensor) -> Tensor:
    """Blocks: 16 bytes of scales and minimums, 64 bytes of codes, d, dmin. uint8 `[rows, bytes]`."""
    scales = (stored(grid.scale_codes, 16) | (stored(grid.min_codes, 16) << 4)).to(torch.uint8)
    packed = pack_planes(codes.reshape(-1, 256), 32, 4, 2)
    return torch.cat([scales, packed, half_bytes(grid.d), half_bytes(stored(grid.dmin, 1))], dim=1).view(
        codes.shape[0], -1
    )


def unpack_q2_k(data: Tensor) -> tuple[Grid, Tensor]:
    """Grid and codes uint8 `[rows, cols]` of packed rows uint8 `[rows, bytes]`."""
    rows = data.shape[0]
    blocks = data.reshape(-1, 84)
    scales = blocks[:, :16].to(torch.int16).view(rows, -1)
    grid = Grid(bytes_half(blocks[:, 80:82], rows), bytes_half(blocks[:, 82:], rows), scales & 15, scales >> 4)
    return grid, unpack_planes(blocks[:, 16:80], 32, 4, 2).view(rows, -1)
