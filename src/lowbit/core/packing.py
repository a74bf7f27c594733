"""Packing of small unsigned codes into int32 words, as the gptq, awq and compressed-tensors formats do."""

from __future__ import annotations

import torch
from torch import Tensor


def packed_size(count: int, bits: int) -> int:
    """Number of int32 words that `count` codes of `bits` bits take."""
    return -(-count * bits // 32)


def pack_int32(codes: Tensor, bits: int, dim: int) -> Tensor:
    """Pack unsigned codes along `dim` into one stream of bits, least significant bits first.

    codes: integers in 0..2**bits-1, bits 1..8. Returns int32 with `dim` cut to ceil(n * bits / 32), padded with
    zeros. Where bits divide 32 every word holds 32/bits whole codes; other codes run on across word borders, 32 codes
    in `bits` words (AutoGPTQ's 3 bit layout and compressed-tensors' `pack_to_int32`).
    """
    rows = codes.movedim(dim, -1)
    words = packed_size(rows.shape[-1], bits)
    if 32 % bits:
        return _pack_stream(rows, bits)[..., :words].movedim(-1, dim).contiguous()
    per_word = 32 // bits
    padded = torch.nn.functional.pad(rows, (0, words * per_word - rows.shape[-1]))
    packed = torch.zeros(*rows.shape[:-1], words, dtype=torch.int32, device=codes.device)
    for position in range(per_word):
        packed |= padded[..., position::per_word].to(torch.int32) << (bits * position)
    return packed.movedim(-1, dim).contiguous()


def unpack_int32(words: Tensor, bits: int, dim: int, count: int) -> Tensor:
    """The inverse of `pack_int32`: the first `count` codes along `dim`, as uint8."""
    packed = words.movedim(dim, -1)
    if 32 % bits:
        return _unpack_stream(packed, bits)[..., :count].movedim(-1, dim).contiguous()
    per_word = 32 // bits
    codes = torch.empty(*packed.shape[:-1], packed.shape[-1] * per_word, dtype=torch.uint8, device=words.device)
    for position in range(per_word):
        codes[..., position::per_word] = ((packed >> (bits * position)) & (2**bits - 1)).to(torch.uint8)
    return codes[..., :count].movedim(-1, dim).contiguous()


def _pack_stream(rows: Tensor, bits: int) -> Tensor:
    """[..., n] codes -> [..., ceil(n/32) * bits] words: code i of 32 starts at bit i * bits of its `bits` words."""
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[-1] % 32)).to(torch.int32)
    padded = padded.reshape(*rows.shape[:-1], -1, 32)
    packed = torch.zeros(*padded.shape[:-1], bits, dtype=torch.int32, device=rows.device)
    for position in range(32):
        word, offset = divmod(position * bits, 32)
        packed[..., word] |= padded[..., position] << offset
        if offset + bits > 32:
            packed[..., word + 1] |= padded[..., position] >> (32 - offset)
    return packed.flatten(-2)


def _unpack_stream(words: Tensor, bits: int) -> Tensor:
    """[..., w] words -> [..., ceil(w / bits) * 32] codes; missing last words count as zero."""
    packed = torch.nn.functional.pad(words, (0, -words.shape[-1] % bits)).reshape(*words.shape[:-1], -1, bits)
    codes = torch.empty(*packed.shape[:-1], 32, dtype=torch.uint8, device=words.device)
    for position in range(32):
        word, offset = divmod(position * bits, 32)
        low = min(bits, 32 - offset)
        code = (packed[..., word] >> offset) & (2**low - 1)
        if low < bits:
            code = code | ((packed[..., word + 1] & (2 ** (bits - low) - 1)) << low)
        codes[..., position] = code.to(torch.uint8)
    return codes.flatten(-2)
