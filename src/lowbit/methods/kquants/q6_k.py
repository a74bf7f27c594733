"""Q6_K: super-blocks of 16 sub-blocks of 16 weights, levels -32..31, 8-bit signed scales, no minimums.

Source: quantize_row_q6_K_ref / _impl in llama.cpp, ggml/src/ggml-quants.c.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.methods.kquants.arithmetic import nearest_int, ratio, signed_extreme, to_half, wrap_int8
from lowbit.methods.kquants.bits import bytes_half, half_bytes, pack_planes, unpack_planes
from lowbit.methods.kquants.constants import GROUP_MAX_EPS
from lowbit.methods.kquants.grid import (
    Grid,
    element_major,
    patch_codes,
    round_uniform,
    row_major,
    spread_importance,
    stored,
    zero_scale_columns,
)
from lowbit.methods.kquants.symmetric import search_symmetric

SUB_BLOCK, PER_SUPER = 16, 16
HALF = 32


def choose_q6_k(weights: Tensor, importance: Tensor | None) -> tuple[Grid, Tensor]:
    """ggml's own grid and codes for `weights` `[rows, cols]` float32 and importance `[cols]`."""
    rows = weights.shape[0]
    x = element_major(weights, SUB_BLOCK, PER_SUPER)
    w = x * x if importance is None else spread_importance(importance, rows, SUB_BLOCK, PER_SUPER)
    fit = search_symmetric(x, w, HALF)
    scales = fit.scale.view(PER_SUPER, -1)
    size, signed = signed_extreme(scales)
    empty = size < GROUP_MAX_EPS
    inverse = ratio(-128.0, torch.where(empty, 1.0, signed))
    d = to_half(ratio(1.0, inverse).masked_fill_(empty, 0.0))
    scale_codes = wrap_int8(nearest_int(inverse * scales).clamp_(max=127)).masked_fill_(empty, 0)
    grid = Grid(d.view(rows, -1), scale_codes=row_major(scale_codes.flatten().to(torch.int16), rows, PER_SUPER))

    codes = round_uniform(weights, grid, -HALF, HALF - 1)
    flat, columns = zero_scale_columns(grid, PER_SUPER)
    left_over = fit.codes(x, HALF, columns).masked_fill_(empty[columns % empty.numel()], 0.0)
    return grid, patch_codes(codes, flat, left_over)


def pack_q6_k(grid: Grid, codes: Tensor) -> Tensor:
    """Blocks: 128 bytes of nibbles, 64 bytes of high bits, 16 scales, d. uint8 `[rows, bytes]`."""
    blocks = codes.reshape(-1, 256)
    scales = stored(grid.scale_codes, 16).to(torch.int8).view(torch.uint8)
    parts = [pack_planes(blocks, 64, 2, 4), pack_planes(blocks >> 4, 32, 4, 2), scales, half_bytes(grid.d)]
    return torch.cat(parts, dim=1).view(codes.shape[0], -1)


def unpack_q6_k(data: Tensor) -> tuple[Grid, Tensor]:
    """Grid and codes uint8 `[rows, cols]` of packed rows uint8 `[rows, bytes]`."""
    rows = data.shape[0]
    blocks = data.reshape(-1, 210)
    codes = unpack_planes(blocks[:, :128], 64, 2, 4) | (unpack_planes(blocks[:, 128:192], 32, 4, 2) << 4)
    scales = blocks[:, 192:208].contiguous().view(torch.int8).to(torch.int16)
    return Grid(bytes_half(blocks[:, 208:], rows), scale_codes=scales.view(rows, -1)), codes.view(rows, -1)
