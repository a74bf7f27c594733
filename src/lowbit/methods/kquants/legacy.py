"""Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0: blocks of 32 weights with their own float16 scale (and minimum).

Source: quantize_row_q4_0_ref / _impl and their like in llama.cpp, ggml/src/ggml-quants.c.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.methods.kquants.arithmetic import (
    divide,
    first_min_max,
    ratio,
    signed_extreme,
    to_half,
    wrap_int8,
)
from lowbit.methods.kquants.bits import (
    bytes_half,
    half_bytes,
    pack_bit_string,
    pack_planes,
    unpack_bit_string,
    unpack_planes,
)
from lowbit.methods.kquants.constants import AffineSearch
from lowbit.methods.kquants.grid import Grid, element_major, stored
from lowbit.methods.kquants.importance import row_weights
from lowbit.methods.kquants.search import search_affine
from lowbit.methods.kquants.symmetric import search_symmetric

BLOCK = 32


def choose_symmetric(weights: Tensor, importance: Tensor | None, half: int) -> tuple[Grid, Tensor]:
    """ggml's own grid and codes of Q4_0 (`half` 8) and Q5_0 (16): levels -half .. half-1."""
    rows = weights.shape[0]
    x = element_major(weights, BLOCK, 1)
    if importance is None:
        _, signed = signed_extreme(x)
        d = divide(signed, -float(half))
        codes = _truncate_int8(x * _inverse(d) + (half + 0.5)).clamp_(max=2 * half - 1)
    else:
        fit = search_symmetric(x, element_major(row_weights(weights, importance), BLOCK, 1), half)
        d, codes = fit.scale, fit.codes(x, half)
    return Grid(to_half(d).view(rows, -1)), _row_major_codes(codes, rows)


def choose_affine(weights: Tensor, importance: Tensor | None, top: int) -> tuple[Grid, Tensor]:
    """ggml's own grid and codes of Q4_1 (`top` 15) and Q5_1 (31): levels 0 .. top."""
    rows = weights.shape[0]
    x = element_major(weights, BLOCK, 1)
    if importance is None:
        low, high = first_min_max(x)
        d = divide(high - low, float(top))
        codes = _truncate_int8((x - low) * _inverse(d) + 0.5).clamp_(max=top)
    else:
        w = element_major(row_weights(weights, importance), BLOCK, 1)
        fit = search_affine(x, w, AffineSearch(top, -0.9, 0.05, 36))
        d, low = fit.scale, -fit.minimum
        codes = fit.codes(x, top, torch.arange(x.shape[1], device=x.device))
    # The grid's sign convention is w = scale * code - minimum; the file stores the minimum with a plus.
    return Grid(to_half(d).view(rows, -1), -to_half(low).view(rows, -1)), _row_major_codes(codes, rows)


def choose_q8_0(weights: Tensor, importance: Tensor | None) -> tuple[Grid, Tensor]:
    """ggml's own grid and codes of Q8_0: levels -128 .. 127, importance unused."""
    blocks = weights.reshape(weights.shape[0], -1, BLOCK)
    d = divide(blocks.abs().amax(-1), 127.0)
    values = blocks * _inverse(d).unsqueeze(-1)
    codes = wrap_int8(_float_to_int(_round_half_away(values))) + 128
    return Grid(to_half(d)), codes.to(torch.uint8).view(weights.shape)


def _inverse(d: Tensor) -> Tensor:
    return torch.where(d != 0, ratio(1.0, d), 0.0)


def _round_half_away(values: Tensor) -> Tensor:
    """C roundf: halves away from zero."""
    whole = values.trunc()
    return whole + ((values - whole).abs() >= 0.5) * values.sign()


def _float_to_int(values: Tensor) -> Tensor:
    """x86's float to int32 conversion: towards zero, and the most negative integer for what does not fit (inf, NaN)."""
    fits = values.abs() < 2147483648.0
    whole = torch.where(fits, values, 0.0).to(torch.int32)
    return torch.where(fits, whole, torch.iinfo(torch.int32).min)


def _truncate_int8(values: Tensor) -> Tensor:
    """C `(uint8_t)(int8_t)value`."""
    return _float_to_int(values) & 0xFF


def _row_major_codes(codes: Tensor, rows: int) -> Tensor:
    return codes.T.to(torch.uint8).reshape(rows, -1)


def pack_q4_0(grid: Grid, codes: Tensor) -> Tensor:
    """Blocks: d, 16 bytes of nibbles. uint8 `[rows, bytes]`. Also IQ4_NL's layout."""
    return torch.cat([half_bytes(grid.d), _nibbles(codes)], dim=1).view(codes.shape[0], -1)


def pack_q4_1(grid: Grid, codes: Tensor) -> Tensor:
    """Blocks: d, m, 16 bytes of nibbles. uint8 `[rows, bytes]`."""
    return torch.cat([_scale_and_minimum(grid), _nibbles(codes)], dim=1).view(codes.shape[0], -1)


def pack_q5_0(grid: Grid, codes: Tensor) -> Tensor:
    """Blocks: d, 4 bytes of fifth bits, 16 bytes of nibbles. uint8 `[rows, bytes]`."""
    return torch.cat([half_bytes(grid.d), _fifth_bits(codes), _nibbles(codes)], dim=1).view(codes.shape[0], -1)


def pack_q5_1(grid: Grid, codes: Tensor) -> Tensor:
    """Blocks: d, m, 4 bytes of fifth bits, 16 bytes of nibbles. uint8 `[rows, bytes]`."""
    return torch.cat([_scale_and_minimum(grid), _fifth_bits(codes), _nibbles(codes)], dim=1).view(codes.shape[0], -1)


def pack_q8_0(grid: Grid, codes: Tensor) -> Tensor:
    """Blocks: d, 32 signed bytes. uint8 `[rows, bytes]`."""
    signed = codes.reshape(-1, BLOCK) ^ 0x80
    return torch.cat([half_bytes(grid.d), signed], dim=1).view(codes.shape[0], -1)


def _scale_and_minimum(grid: Grid) -> Tensor:
    return torch.cat([half_bytes(grid.d), half_bytes(-stored(grid.dmin, 1))], dim=1)


def _nibbles(codes: Tensor) -> Tensor:
    return pack_planes(codes.reshape(-1, BLOCK), 16, 2, 4)


def _fifth_bits(codes: Tensor) -> Tensor:
    return pack_bit_string(codes.reshape(-1, BLOCK) >> 4)


def unpack_q4_0(data: Tensor) -> tuple[Grid, Tensor]:
    """Grid and codes uint8 `[rows, cols]` of packed rows. Also IQ4_NL's."""
    return _unpack(data, 18, minimum=False, fifth=False)


def unpack_q4_1(data: Tensor) -> tuple[Grid, Tensor]:
    """Grid and codes uint8 `[rows, cols]` of packed rows."""
    return _unpack(data, 20, minimum=True, fifth=False)


def unpack_q5_0(data: Tensor) -> tuple[Grid, Tensor]:
    """Grid and codes uint8 `[rows, cols]` of packed rows."""
    return _unpack(data, 22, minimum=False, fifth=True)


def unpack_q5_1(data: Tensor) -> tuple[Grid, Tensor]:
    """Grid and codes uint8 `[rows, cols]` of packed rows."""
    return _unpack(data, 24, minimum=True, fifth=True)


def _unpack(data: Tensor, block_bytes: int, *, minimum: bool, fifth: bool) -> tuple[Grid, Tensor]:
    rows = data.shape[0]
    blocks = data.reshape(-1, block_bytes)
    codes = unpack_planes(blocks[:, -16:], 16, 2, 4)
    if fifth:
        codes |= unpack_bit_string(blocks[:, -20:-16]) << 4
    dmin = -bytes_half(blocks[:, 2:4], rows) if minimum else None
    return Grid(bytes_half(blocks[:, :2], rows), dmin), codes.view(rows, -1)


def unpack_q8_0(data: Tensor) -> tuple[Grid, Tensor]:
    """Grid and codes uint8 `[rows, cols]` of packed rows."""
    rows = data.shape[0]
    blocks = data.reshape(-1, 34)
    return Grid(bytes_half(blocks[:, :2], rows)), (blocks[:, 2:] ^ 0x80).view(rows, -1)
