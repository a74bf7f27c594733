"""Packing of small unsigned codes into int32 words, the layout shared by the gptq and compressed-tensors formats."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_int32(codes: Tensor, bits: int, dim: int) -> Tensor:
    """Pack unsigned codes along `dim`, least significant bits first.

    codes: integers in 0..2**bits-1 with the packed dimension padded by zeros to a whole number of words.
    Returns int32 with `dim` shortened to ceil(n * bits / 32). For bits that divide 32 every word holds 32/bits whole
    codes; 3 bits run on across word borders (AutoGPTQ's layout: 32 codes in 3 words).
    """
    columns = codes.movedim(dim, -1).to(torch.int64)
    per_word = 32 // bits
    if 32 % bits:
        return _pack_dense(columns, bits).movedim(-1, dim).contiguous()
    padding = -columns.shape[-1] % per_word
    columns = torch.nn.functional.pad(columns, (0, padding)).unflatten(-1, (-1, per_word))
    shifts = torch.arange(per_word, device=codes.device) * bits
    words = (columns << shifts).sum(-1)
    return _as_int32(words).movedim(-1, dim).contiguous()


def unpack_int32(words: Tensor, bits: int, dim: int, count: int) -> Tensor:
    """The inverse of `pack_int32`: the first `count` codes along `dim`, as uint8."""
    packed = words.movedim(dim, -1).to(torch.int64) & 0xFFFFFFFF
    if 32 % bits:
        codes = _unpack_dense(packed, bits)
    else:
        shifts = torch.arange(0, 32, bits, device=words.device)
        codes = ((packed.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(-2)
    return codes[..., :count].to(torch.uint8).movedim(-1, dim).contiguous()


def _as_int32(words: Tensor) -> Tensor:
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _pack_dense(codes: Tensor, bits: int) -> Tensor:
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % 32))
    stream = (codes.unsqueeze(-1) >> torch.arange(bits, device=codes.device)) & 1
    stream = stream.flatten(-2).unflatten(-1, (-1, 32))
    return _as_int32((stream << torch.arange(32, device=codes.device)).sum(-1))


def _unpack_dense(words: Tensor, bits: int) -> Tensor:
    stream = ((words.unsqueeze(-1) >> torch.arange(32, device=words.device)) & 1).flatten(-2)
    stream = stream.unflatten(-1, (-1, bits))
    return (stream << torch.arange(bits, device=words.device)).sum(-1)
