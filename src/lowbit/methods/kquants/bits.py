"""Bit layouts shared by ggml's block types. Codes are uint8 `[blocks, weights of a block]`.

Source: llama.cpp, ggml/src/ggml-common.h and the pack loops of ggml/src/ggml-quants.c.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack_planes(codes: Tensor, run: int, planes: int, bits: int) -> Tensor:
    """Bytes uint8 `[blocks, n / planes]`: within each group of `run * planes` codes, byte i takes codes i, i + run, ...

    The first goes to the lowest `bits` bits. Higher bits of the codes are dropped.
    """
    grouped = (codes & ((1 << bits) - 1)).view(codes.shape[0], -1, planes, run)
    packed = grouped[:, :, 0].clone()
    for plane in range(1, planes):
        packed |= grouped[:, :, plane] << (bits * plane)
    return packed.reshape(codes.shape[0], -1)


def unpack_planes(packed: Tensor, run: int, planes: int, bits: int) -> Tensor:
    """Inverse of `pack_planes`: codes uint8 `[blocks, n]`."""
    grouped = packed.reshape(packed.shape[0], -1, run)
    parts = [(grouped >> (bits * plane)) & ((1 << bits) - 1) for plane in range(planes)]
    return torch.stack(parts, dim=2).reshape(packed.shape[0], -1)


def pack_bit_string(bits: Tensor) -> Tensor:
    """Bits (0/1 uint8 `[blocks, n]`) to bytes `[blocks, n / 8]`, first bit lowest (a little-endian integer)."""
    return pack_planes(bits, 1, 8, 1)


def unpack_bit_string(packed: Tensor) -> Tensor:
    """Inverse of `pack_bit_string`."""
    return unpack_planes(packed, 1, 8, 1)


def half_bytes(values: Tensor) -> Tensor:
    """float16 `[rows, blocks]` to little-endian bytes uint8 `[rows * blocks, 2]`."""
    return values.contiguous().view(torch.uint8).view(-1, 2)


def bytes_half(packed: Tensor, rows: int) -> Tensor:
    """Bytes uint8 `[rows * blocks, 2]` to float16 `[rows, blocks]`."""
    return packed.contiguous().view(torch.float16).view(rows, -1)


def pack_scales_k4(scales: Tensor, minimums: Tensor) -> Tensor:
    """Eight 6-bit scales and minimums a block (uint8 `[blocks, 8]` each) to the 12 bytes of Q4_K and Q5_K."""
    s_low, s_high = scales[:, :4], scales[:, 4:]
    m_low, m_high = minimums[:, :4], minimums[:, 4:]
    return torch.cat(
        [s_low | (s_high >> 4 << 6), m_low | (m_high >> 4 << 6), (s_high & 15) | ((m_high & 15) << 4)], dim=1
    )


def unpack_scales_k4(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse of `pack_scales_k4`."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat([first & 63, (third & 15) | (first >> 6 << 4)], dim=1)
    minimums = torch.cat([second & 63, (third >> 4) | (second >> 6 << 4)], dim=1)
    return scales, minimums


def pack_scales_q3(scales: Tensor) -> Tensor:
    """Sixteen 6-bit scales a block (uint8 `[blocks, 16]`) to the 12 bytes of Q3_K."""
    return torch.cat([pack_planes(scales, 8, 2, 4), pack_planes(scales >> 4, 4, 4, 2)], dim=1)


def unpack_scales_q3(packed: Tensor) -> Tensor:
    """Inverse of `pack_scales_q3`."""
    return unpack_planes(packed[:, :8], 8, 2, 4) | (unpack_planes(packed[:, 8:], 4, 4, 2) << 4)
