"""Q4_K and Q5_K: super-blocks of 8 sub-blocks of 32 weights, 6-bit scales and minimums.

Source: quantize_row_q4_K_ref / _impl and quantize_row_q5_K_ref / _impl in llama.cpp, ggml/src/ggml-quants.c.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.methods.kquants.arithmetic import (
    divide,
    exact_sqrt_,
    nearest_int,
    ratio,
    sequential_sum,
    to_half,
    wrap_uint8,
)
from lowbit.methods.kquants.bits import (
    bytes_half,
    half_bytes,
    pack_planes,
    pack_scales_k4,
    unpack_planes,
    unpack_scales_k4,
)
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

SUB_BLOCK, PER_SUPER = 32, 8
MAX_SCALE_CODE = 63
PLAIN = {15: AffineSearch(15, -1.0, 0.1, 20), 31: AffineSearch(31, -0.5, 0.1, 15)}


def choose_q4_k(weights: Tensor, importance: Tensor | None) -> tuple[Grid, Tensor]:
    """ggml's own grid and codes for `weights` `[rows, cols]` float32 and importance `[cols]`."""
    return _choose(weights, importance, 15)


def choose_q5_k(weights: Tensor, importance: Tensor | None) -> tuple[Grid, Tensor]:
    """ggml's own grid and codes for `weights` `[rows, cols]` float32 and importance `[cols]`."""
    return _choose(weights, importance, 31)


def _choose(weights: Tensor, importance: Tensor | None, top: int) -> tuple[Grid, Tensor]:
    rows = weights.shape[0]
    x = element_major(weights, SUB_BLOCK, PER_SUPER)
    if importance is None:
        fit = search_affine(x, _plain_weights(x), PLAIN[top])
        d, scale_codes = _spread_max(fit.scale.view(PER_SUPER, -1))
        dmin, min_codes = _spread_max(fit.minimum.view(PER_SUPER, -1))
    else:
        w = super_block_weights(x, importance, rows, PER_SUPER, 2.0)
        fit = search_affine(x, w, AffineSearch(top, -0.9, 0.05, 36))
        sums = sequential_sum(w).view(PER_SUPER, -1)
        d, scale_codes = search_positive(fit.scale.view(PER_SUPER, -1), sums, MAX_SCALE_CODE)
        dmin, min_codes = search_positive(fit.minimum.view(PER_SUPER, -1), sums, MAX_SCALE_CODE)
    grid = Grid(
        to_half(d).view(rows, -1),
        to_half(dmin).view(rows, -1),
        row_major(_as_stored(scale_codes), rows, PER_SUPER),
        row_major(_as_stored(min_codes), rows, PER_SUPER),
    )
    codes = round_uniform(weights, grid, 0, top)
    flat, columns = zero_scale_columns(grid, PER_SUPER)
    return grid, patch_codes(codes, flat, fit.codes(x, top, columns))


def _plain_weights(x: Tensor) -> Tensor:
    """Root mean square of the sub-block plus |x|."""
    return exact_sqrt_(divide(sequential_sum(x * x), float(SUB_BLOCK))) + x.abs()


def _spread_max(values: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of `[8, supers]` values gets code 63, and the others their share of it."""
    largest = values.amax(0).clamp_(min=0.0) + 0.0  # never -0
    inverse = torch.where(largest > 0, ratio(float(MAX_SCALE_CODE), largest), 0.0)
    codes = wrap_uint8(nearest_int(inverse * values)).clamp_(max=MAX_SCALE_CODE)
    return divide(largest, float(MAX_SCALE_CODE)), codes


def _as_stored(codes: Tensor) -> Tensor:
    return codes.flatten().to(torch.int16)


def pack_q4_k(grid: Grid, codes: Tensor) -> Tensor:
    """Blocks: d, dmin, 12 bytes of scales and minimums, 128 bytes of nibbles. uint8 `[rows, bytes]`."""
    return _join(grid, [pack_planes(codes.reshape(-1, 256), 32, 2, 4)], codes.shape[0])


def pack_q5_k(grid: Grid, codes: Tensor) -> Tensor:
    """Blocks: d, dmin, 12 bytes of scales and minimums, 32 bytes of fifth bits, 128 bytes of nibbles."""
    blocks = codes.reshape(-1, 256)
    return _join(grid, [pack_planes(blocks >> 4, 32, 8, 1), pack_planes(blocks, 32, 2, 4)], codes.shape[0])


def _join(grid: Grid, code_bytes: list[Tensor], rows: int) -> Tensor:
    scales = pack_scales_k4(stored(grid.scale_codes, 8).to(torch.uint8), stored(grid.min_codes, 8).to(torch.uint8))
    return torch.cat([half_bytes(grid.d), half_bytes(stored(grid.dmin, 1)), scales, *code_bytes], dim=1).view(rows, -1)


def unpack_q4_k(data: Tensor) -> tuple[Grid, Tensor]:
    """Grid and codes uint8 `[rows, cols]` of packed rows uint8 `[rows, bytes]`."""
    rows = data.shape[0]
    blocks = data.reshape(-1, 144)
    return _split_grid(blocks, rows), unpack_planes(blocks[:, 16:], 32, 2, 4).view(rows, -1)


def unpack_q5_k(data: Tensor) -> tuple[Grid, Tensor]:
    """Grid and codes uint8 `[rows, cols]` of packed rows uint8 `[rows, bytes]`."""
    rows = data.shape[0]
    blocks = data.reshape(-1, 176)
    codes = unpack_planes(blocks[:, 48:], 32, 2, 4) | (unpack_planes(blocks[:, 16:48], 32, 8, 1) << 4)
    return _split_grid(blocks, rows), codes.view(rows, -1)


def _split_grid(blocks: Tensor, rows: int) -> Grid:
    scales, minimums = unpack_scales_k4(blocks[:, 4:16])
    return Grid(
        bytes_half(blocks[:, :2], rows),
        bytes_half(blocks[:, 2:4], rows),
        scales.to(torch.int16).view(rows, -1),
        minimums.to(torch.int16).view(rows, -1),
    )
