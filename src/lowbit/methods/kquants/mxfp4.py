"""MXFP4: blocks of 32 weights, a power-of-two scale (E8M0) and E2M1 codes.

Source: quantize_row_mxfp4_ref in llama.cpp, ggml/src/ggml-quants.c; OCP Microscaling Formats (MX) Specification 1.0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.methods.kquants.bits import pack_planes, unpack_planes
from lowbit.methods.kquants.grid import Grid

LEVELS = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Twice the E2M1 values; the scale is half the E8M0 one."""

BLOCK = 32


def choose_mxfp4(weights: Tensor, importance: Tensor | None) -> tuple[Grid, Tensor]:
    """ggml's own grid and codes for `weights` `[rows, cols]` float32; importance is unused."""
    rows = weights.shape[0]
    largest = weights.reshape(rows, -1, BLOCK).abs().amax(-1)
    # frexp: largest = mantissa * 2**exponent with mantissa in [0.5, 1), so floor(log2(largest)) = exponent - 1.
    exponent = torch.frexp(largest).exponent - 1
    stored = torch.where(largest > 0, (exponent - 2 + 127) & 0xFF, 0)
    grid = Grid(_half_e8m0(stored))
    return grid, round_mxfp4(weights, grid)


def round_mxfp4(weights: Tensor, grid: Grid) -> Tensor:
    """Codes uint8 `[rows, cols]` of the level with the smallest error, the first of equals (ggml's order of levels)."""
    x = weights.reshape(*grid.d.shape, BLOCK)
    d = grid.d.unsqueeze(-1)
    best = x.abs()
    codes = torch.zeros_like(x, dtype=torch.uint8)
    for code, level in enumerate(LEVELS[1:], start=1):
        error = (d * float(level) - x).abs_()
        better = error < best
        best = torch.where(better, error, best)
        codes.masked_fill_(better, code)
    return codes.view(weights.shape)


def _half_e8m0(stored: Tensor) -> Tensor:
    """Half of 2**(stored - 127) as float32 (denormal for stored < 2)."""
    return torch.ldexp(torch.ones_like(stored, dtype=torch.float32), stored - 128)


def pack_mxfp4(grid: Grid, codes: Tensor) -> Tensor:
    """Blocks: the exponent byte, 16 bytes of codes. uint8 `[rows, bytes]`."""
    stored = (torch.frexp(grid.d).exponent - 1 + 128).to(torch.uint8).reshape(-1, 1)
    return torch.cat([stored, pack_planes(codes.reshape(-1, BLOCK), 16, 2, 4)], dim=1).view(codes.shape[0], -1)


def unpack_mxfp4(data: Tensor) -> tuple[Grid, Tensor]:
    """Grid and codes uint8 `[rows, cols]` of packed rows uint8 `[rows, bytes]`."""
    rows = data.shape[0]
    blocks = data.reshape(-1, 17)
    d = _half_e8m0(blocks[:, 0].to(torch.int32)).view(rows, -1)
    return Grid(d), unpack_planes(blocks[:, 1:], 16, 2, 4).view(rows, -1)
