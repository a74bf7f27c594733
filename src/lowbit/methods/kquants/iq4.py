"""IQ4_NL and IQ4_XS: sixteen levels spaced unevenly, in blocks of 32 or in super-blocks of 8 such blocks.

Source: quantize_row_iq4_nl_impl in llama.cpp, ggml/src/ggml-quants.c, as quantize_iq4_nl and quantize_iq4_xs call it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.methods.kquants.arithmetic import divide, nearest_int, ratio, sequential_sum, signed_extreme, to_half
from lowbit.methods.kquants.bits import bytes_half, half_bytes, pack_planes, unpack_planes
from lowbit.methods.kquants.constants import GROUP_MAX_EPS
from lowbit.methods.kquants.grid import Grid, element_major, nearest_level, row_major, stored
from lowbit.methods.kquants.importance import super_block_weights
from lowbit.methods.kquants.loops import gpu_for
from lowbit.methods.kquants.search import CUDA_SLICE_WEIGHTS, SLICE_WEIGHTS

LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
BLOCK = 32
TRIALS = 7


def choose_iq4_nl(weights: Tensor, importance: Tensor | None) -> tuple[Grid, Tensor]:
    """ggml's own grid and codes for `weights` `[rows, cols]` float32 and importance `[cols]`."""
    rows = weights.shape[0]
    x = element_major(weights, BLOCK, 1)
    scale = _search(x, x * x if importance is None else super_block_weights(x, importance, rows, 1, 2.0))
    inverse = torch.where(scale != 0, ratio(1.0, scale), 0.0)
    codes = nearest_level(x * inverse, LEVELS)
    return Grid(to_half(scale).view(rows, -1)), codes.T.reshape(rows, -1)


def choose_iq4_xs(weights: Tensor, importance: Tensor | None) -> tuple[Grid, Tensor]:
    """ggml's own grid and codes for `weights` `[rows, cols]` float32 and importance `[cols]`."""
    rows = weights.shape[0]
    x = element_major(weights, BLOCK, 8)
    scale = _search(x, x * x if importance is None else super_block_weights(x, importance, rows, 8, 2.0)).view(8, -1)
    _, largest = signed_extreme(scale)
    d = divide(-largest, 32.0)
    inverse = torch.where(d != 0, ratio(1.0, d), 0.0)
    scale_codes = nearest_int(inverse * scale).clamp_(-32, 31)
    # The codes are chosen with the scale before its rounding to float16.
    exact = (d * scale_codes).flatten()
    inverse = torch.where(exact != 0, ratio(1.0, exact), 0.0)
    codes = nearest_level(x * inverse, LEVELS).view(BLOCK, 8, -1).permute(2, 1, 0).reshape(rows, -1)
    return Grid(to_half(d).view(rows, -1), scale_codes=row_major(scale_codes.flatten().to(torch.int16), rows, 8)), codes


def _search(x: Tensor, weights: Tensor) -> Tensor:
    """Weighted least-squares scale `[B]` of every block over 16 trial scales."""
    gpu = gpu_for(x)
    search_slice = _search_slice if gpu is None else gpu.search_uneven
    width = (CUDA_SLICE_WEIGHTS if x.is_cuda else SLICE_WEIGHTS) // BLOCK
    return torch.cat(
        [
            search_slice(x[:, at : at + width].contiguous(), weights[:, at : at + width].contiguous())
            for at in range(0, x.shape[1], width)
        ]
    )


def _search_slice(x: Tensor, w: Tensor) -> Tensor:
    size, signed = signed_extreme(x)
    empty = size < GROUP_MAX_EPS
    signed = torch.where(empty, 1.0, signed)
    levels = torch.tensor(LEVELS, dtype=torch.float32, device=x.device)

    first = ratio(1.0, divide(-signed, float(LEVELS[0])))
    sum_lx, sum_l2 = _moments(x, w, first, levels)
    scale = torch.where(sum_l2 > 0, sum_lx / sum_l2, 0.0)
    best = scale * sum_lx
    for trial in range(-TRIALS, TRIALS + 1):
        sum_lx, sum_l2 = _moments(x, w, ratio(float(trial + LEVELS[0]), signed), levels)
        better = (sum_l2 > 0) & (sum_lx * sum_lx > best * sum_l2)
        scale = torch.where(better, sum_lx / sum_l2, scale)
        best = torch.where(better, scale * sum_lx, best)
    return scale.masked_fill_(empty, 0.0)


def _moments(x: Tensor, w: Tensor, inverse: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    level = levels[nearest_level(x * inverse, LEVELS).to(torch.int32)]
    weighted = w * level
    terms = torch.stack([weighted * x, weighted * level], dim=1)
    sum_lx, sum_l2 = sequential_sum(terms).unbind(0)
    return sum_lx, sum_l2


def pack_iq4_xs(grid: Grid, codes: Tensor) -> Tensor:
    """Blocks: d, high scale bits (uint16), 4 bytes of low scale bits, 128 bytes of nibbles. uint8 `[rows, bytes]`."""
    scales = (stored(grid.scale_codes, 8) + 32).to(torch.uint8)
    parts = [
        half_bytes(grid.d),
        pack_planes(scales >> 4, 1, 4, 2),
        pack_planes(scales, 1, 2, 4),
        pack_planes(codes.reshape(-1, 256), 16, 2, 4),
    ]
    return torch.cat(parts, dim=1).view(codes.shape[0], -1)


def unpack_iq4_xs(data: Tensor) -> tuple[Grid, Tensor]:
    """Grid and codes uint8 `[rows, cols]` of packed rows uint8 `[rows, bytes]`."""
    rows = data.shape[0]
    blocks = data.reshape(-1, 136)
    scales = unpack_planes(blocks[:, 4:8], 1, 2, 4) | (unpack_planes(blocks[:, 2:4], 1, 4, 2) << 4)
    grid = Grid(bytes_half(blocks[:, :2], rows), scale_codes=(scales.to(torch.int16) - 32).view(rows, -1))
    return grid, unpack_planes(blocks[:, 8:], 16, 2, 4).view(rows, -1)
