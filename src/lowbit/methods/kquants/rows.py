"""Encoding and decoding of whole weight matrices, a bounded number of rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NoReturn

import torch
from torch import Tensor

from lowbit.core.errors import FormatError
from lowbit.core.ggml_types import GGMLType, ggml_type
from lowbit.methods.kquants.codec import CODECS
from lowbit.methods.kquants.native import fill_natively

CHUNK_WEIGHTS = 1 << 20
CUDA_CHUNK_WEIGHTS = 1 << 25
LARGEST_WEIGHT = 65504.0 * 128 * 128  # float16 scale, 8-bit scale code, 8-bit level

_STORAGE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def encode(type_name: str, weights: Tensor, importance: Tensor | None = None, *, native: bool = True) -> Tensor:
    """Rows of `weights` (float32 `[rows, cols]`) as ggml stores them: uint8 `[rows, bytes_per_row]`, same device.

    Byte for byte what ggml's reference row quantizers give, without and with `importance` (float32 `[cols]`, a mean
    of squared inputs; never negative). Beside input and output it takes at most 40 bytes a weight of a chunk: a chunk
    is 2**20 weights on a CPU (40 MiB) and 2**25 on a GPU (1.25 GiB), or one row where that is longer. native: let C do it
    on a CPU, where xllamacpp is installed.

    Raises FormatError for weights or importance that are not finite or do not fit the type, and, as llama-quantize
    does, where a scale overflows float16.
    """
    kind = ggml_type(type_name)
    row_bytes = _check(kind, weights, importance)
    out = torch.empty(weights.shape[0], row_bytes, dtype=torch.uint8, device=weights.device)
    largest = _largest(kind, weights) if weights.numel() else 0.0
    if native and kind.name not in _STORAGE and fill_natively(kind, weights, importance, largest, out):
        return out
    for rows in _chunks(weights):
        out[rows] = _encode_chunk(kind, weights[rows].contiguous(), importance)
    return out


def _largest(kind: GGMLType, weights: Tensor) -> float:
    """The largest absolute weight. Raises FormatError for weights that are not finite or too large for the type."""
    low, high = (float(end) for end in torch.stack(torch.aminmax(weights)).tolist())  # NaN anywhere makes both NaN
    if not (math.isfinite(low) and math.isfinite(high)):
        raise FormatError(
            f"The weights hold NaN or infinity, so nothing was encoded as {kind.name}.",
            hint="check the checkpoint: lowbit does not encode broken weights",
        )
    largest = max(-low, high)
    if kind.name not in _STORAGE and kind.name != "MXFP4" and largest > LARGEST_WEIGHT:
        _refuse_size(kind)  # ggml's searches overflow and would quietly store zeros
    return largest


def _encode_chunk(kind: GGMLType, weights: Tensor, importance: Tensor | None) -> Tensor:
    if kind.name in _STORAGE:
        stored = weights.to(_STORAGE[kind.name])
        _check_finite(kind, stored)
        return stored.view(torch.uint8).view(weights.shape[0], -1)
    codec = CODECS[kind.name]
    grid, codes = codec.choose(weights, importance)
    _check_finite(kind, grid.d, grid.dmin)
    return codec.pack(grid, codes)


def _check_finite(kind: GGMLType, *stored: Tensor | None) -> None:
    if not all(bool(torch.isfinite(part).all()) for part in stored if part is not None):
        _refuse_size(kind)


def _refuse_size(kind: GGMLType) -> NoReturn:
    raise FormatError(
        f"A weight or scale is too large for {kind.name}, so nothing was encoded.",
        hint="store this tensor as BF16 or F32 (--tensor-type NAME=BF16)",
    )


def decode(type_name: str, data: Tensor, cols: int) -> Tensor:
    """Weights float32 `[rows, cols]` of `data`, uint8 `[rows, bytes_per_row]`, exactly as ggml dequantizes.

    Raises FormatError if a row of `cols` weights does not take that many bytes.
    """
    kind = ggml_type(type_name)
    if data.dtype != torch.uint8 or data.dim() != 2 or data.shape[1] != kind.row_bytes(cols):
        raise FormatError(
            f"{kind.name} rows of {cols} weights take {kind.row_bytes(cols)} bytes; "
            f"got {data.dtype} {list(data.shape)}."
        )
    out = torch.empty(data.shape[0], cols, dtype=torch.float32, device=data.device)
    for rows in _chunks(out):
        part = data[rows].contiguous()
        if kind.name in _STORAGE:
            out[rows] = part.view(_STORAGE[kind.name]).to(torch.float32)
        else:
            codec = CODECS[kind.name]
            out[rows] = codec.dequantize(*codec.unpack(part))
    return out


def _check(kind: GGMLType, weights: Tensor, importance: Tensor | None) -> int:
    if weights.dtype != torch.float32 or weights.dim() != 2:
        raise FormatError(f"Weights must be a float32 matrix to be encoded; got {weights.dtype} {list(weights.shape)}.")
    row_bytes = kind.row_bytes(weights.shape[1])
    if importance is None:
        return row_bytes
    if importance.dtype != torch.float32 or importance.shape != weights.shape[1:]:
        raise FormatError(
            f"Importance must be float32 with one value a column ({weights.shape[1]}); "
            f"got {importance.dtype} {list(importance.shape)}."
        )
    if not bool((torch.isfinite(importance) & (importance >= 0)).all()):
        raise FormatError("Importance holds NaN, infinity or a negative value, so nothing was encoded.")
    return row_bytes


def _chunks(matrix: Tensor) -> Iterator[slice]:
    rows, cols = matrix.shape
    step = max(1, (CUDA_CHUNK_WEIGHTS if matrix.is_cuda else CHUNK_WEIGHTS) // cols)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
