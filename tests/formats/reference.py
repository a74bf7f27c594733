"""Slow, literal readers of each stored layout, written from the formats' definitions without lowbit's packing code."""

from __future__ import annotations

import torch
from torch import Tensor

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


def stream_codes(words: list[int], bits: int, count: int) -> list[int]:
    """Codes of a stream of 32 bit words, least significant bits first, by arithmetic on one big integer."""
    number = sum((word & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(words))
    return [(number >> (bits * place)) & (2**bits - 1) for place in range(count)]


def unpack_rows(words: Tensor, bits: int, count: int) -> Tensor:
    """[n, words] -> int64 [n, count]."""
    return torch.tensor([stream_codes(row, bits, count) for row in words.tolist()], dtype=torch.int64)


def read_gptq(stored: dict[str, Tensor], config: dict) -> Tensor:
    """Dense float64 [out, in] of a gptq layer: w[o, i] = scales[g, o] * (code[i, o] - zero[g, o]), g = g_idx[i]."""
    bits, version_1 = config["bits"], config["checkpoint_format"] == "gptq"
    index, scales = stored["g_idx"].tolist(), stored["scales"].double()
    codes = unpack_rows(stored["qweight"].T, bits, len(index))  # [out, in]
    zeros = unpack_rows(stored["qzeros"], bits, codes.shape[0]) + (1 if version_1 else 0)  # [groups, out]
    dense = torch.empty(codes.shape, dtype=torch.float64)
    for column, group in enumerate(index):
        dense[:, column] = (codes[:, column] - zeros[group]) * scales[group]
    return dense


def read_awq(stored: dict[str, Tensor], config: dict) -> Tensor:
    """Dense float64 [out, in] of an AutoAWQ GEMM layer, nibble by nibble."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def unpack(words: Tensor) -> Tensor:
        values = torch.empty(words.shape[0], words.shape[1] * 8, dtype=torch.int64)
        for row in range(words.shape[0]):
            for place, word in enumerate(words[row].tolist()):
                for nibble in range(8):
                    values[row, 8 * place + order[nibble]] = ((word & 0xFFFFFFFF) >> (4 * nibble)) & 15
        return values

    codes, zeros, scales = unpack(stored["qweight"]), unpack(stored["qzeros"]), stored["scales"].double()
    group = config["group_size"] if config["group_size"] > 0 else codes.shape[0]
    rows = [(codes[row] - zeros[row // group]) * scales[row // group] for row in range(codes.shape[0])]
    return torch.stack(rows, 1)


def read_packed(stored: dict[str, Tensor], arguments: dict) -> Tensor:
    """Dense float64 [out, in] of a compressed-tensors pack-quantized layer."""
    bits, (rows, columns) = arguments["num_bits"], stored["weight_shape"].tolist()
    middle = 2 ** (bits - 1)
    codes = unpack_rows(stored["weight_packed"], bits, columns) - middle
    scale = stored["weight_scale"].double()
    zero = torch.zeros(scale.shape, dtype=torch.int64)
    if not arguments["symmetric"]:
        zero = unpack_rows(stored["weight_zero_point"].T, bits, rows).T - middle
    group = arguments.get("group_size") or columns
    dense = [(codes[:, column] - zero[:, column // group]) * scale[:, column // group] for column in range(columns)]
    return torch.stack(dense, 1)


def read_scaled(stored: dict[str, Tensor], block: int | None = None) -> Tensor:
    """Dense float64 [out, in] of an int8 or float8 weight with a scale by tensor, row or block."""
    weight, scale = stored["weight"].double(), stored["weight_scale"].double()
    if block is None:
        return weight * scale
    dense = torch.empty_like(weight)
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            dense[row, column] = weight[row, column] * scale[row // block, column // block]
    return dense


def read_fp4(stored: dict[str, Tensor], group: int) -> Tensor:
    """Dense float64 [out, in] of nvfp4 or mxfp4 in compressed-tensors."""
    packed, scale = stored["weight_packed"].tolist(), stored["weight_scale"]
    if scale.dtype == torch.uint8:
        factor = torch.tensor([[2.0 ** (exponent - 127) for exponent in row] for row in scale.tolist()]).double()
    else:
        factor = scale.double() / stored["weight_global_scale"].double()
    dense = [[E2M1[nibble] for byte in row for nibble in (byte & 15, byte >> 4)] for row in packed]
    values = torch.tensor(dense, dtype=torch.float64)
    return torch.stack([values[:, c] * factor[:, c // group] for c in range(values.shape[1])], 1)
