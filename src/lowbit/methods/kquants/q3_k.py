"""Q3_K: super-blocks of 16 sub-blocks of 16 weights, levels -4..3, 6-bit signed scales, no minimums.

Source: quantize_row_q3_K_ref / _impl in llama.cpp, ggml/src/ggml-quants.c.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.methods.kquants.arithmetic import (
    nearest_int,
    ratio,
    sequential_sum,
    signed_extreme,
    to_half,
    wrap_int8,
)
from lowbit.methods.kquants.bits import (
    bytes_half,
    half_bytes,
    pack_planes,
    pack_scales_q3,
    unpack_planes,
    unpack_scales_q3,
)
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
from lowbit.methods.kquants.symmetric import search_descending, search_symmetric

SUB_BLOCK, PER_SUPER = 16, 16
HALF, SCALE_HALF = 4, 32


def choose_q3_k(weights: Tensor, importance: Tensor | None) -> tuple[Grid, Tensor]:
    """ggml's own grid and codes for `weights` `[rows, cols]` float32 and importance `[cols]`."""
    rows = weights.shape[0]
    x = element_major(weights, SUB_BLOCK, PER_SUPER)
    if importance is None:
        scale, left_over = search_descending(x, HALF)
        d, scale_codes = _spread_extreme(scale.view(PER_SUPER, -1))
    else:
        w = super_block_weights(x, importance, rows, PER_SUPER, 2.0)
        fit = search_symmetric(x, w, HALF)
        scale = fit.scale.view(PER_SUPER, -1)
        outer = search_symmetric(scale, sequential_sum(w).view(PER_SUPER, -1), SCALE_HALF)
        d, scale_codes = outer.scale, outer.codes(scale, SCALE_HALF) - SCALE_HALF
        left_over = fit.codes(x, HALF)
    stored_codes = row_major(scale_codes.flatten().to(torch.int16), rows, PER_SUPER)
    grid = Grid(to_half(d).view(rows, -1), scale_codes=stored_codes)
    codes = round_uniform(weights, grid, -HALF, HALF - 1)
    flat, columns = zero_scale_columns(grid, PER_SUPER)
    return grid, patch_codes(codes, flat, left_over[:, columns])


def _spread_extreme(scales: Tensor) -> tuple[Tensor, Tensor]:
    """The scale of largest magnitude gets code -32, and the others their share of it; `[16, supers]`."""
    size, signed = signed_extreme(scales)
    empty = size == 0
    inverse = ratio(-float(SCALE_HALF), signed)
    codes = wrap_int8(nearest_int(inverse * scales)).clamp_(-SCALE_HALF, SCALE_HALF - 1)
    # An all-zero super-block stores twelve zero bytes, which read as scales of -32.
    return ratio(1.0, inverse).masked_fill_(empty, 0.0), codes.masked_fill_(empty, -SCALE_HALF)


def pack_q3_k(grid: Grid, codes: Tensor) -> Tensor:
    """Blocks: 32 bytes of third bits, 64 bytes of low bits, 12 bytes of scales, d. uint8 `[rows, bytes]`."""
    blocks = codes.reshape(-1, 256)
    scales = pack_scales_q3((stored(grid.scale_codes, 16) + SCALE_HALF).to(torch.uint8))
    parts = [pack_planes(blocks >> 2, 32, 8, 1), pack_planes(blocks, 32, 4, 2), scales, half_bytes(grid.d)]
    return torch.cat(parts, dim=1).view(codes.shape[0], -1)


def unpack_q3_k(data: Tensor) -> tuple[Grid, Tensor]:
    """Grid and codes uint8 `[rows, cols]` of packed rows uint8 `[rows, bytes]`."""
    rows = data.shape[0]
    blocks = data.reshape(-1, 110)
    codes = unpack_planes(blocks[:, 32:96], 32, 4, 2) | (unpack_planes(blocks[:, :32], 32, 8, 1) << 2)
    scales = unpack_scales_q3(blocks[:, 96:108]).to(torch.int16) - SCALE_HALF
    return Grid(bytes_half(blocks[:, 108:], rows), scale_codes=scales.view(rows, -1)), codes.view(rows, -1)
