"""FP8 weights: float8_e4m3fn times a scale for the tensor, a row or a square block.

E4M3 as in Micikevicius et al., "FP8 Formats for Deep Learning", 2022: 3 bits of mantissa, largest value 448. A floating
point grid looks the same at every power of two, so what a scale decides is where within an octave the weights lie, and
how many small ones fall below the smallest step; both are searched for the least error instead of taking the maximum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.core.contracts import Method, Needs, Quantized
from lowbit.core.primitives import stored_scale
from lowbit.core.qtensor import QTensor
from lowbit.core.scheme import WeightScheme
from lowbit.core.statistics import InputStatistics

_LARGEST = 448.0


@dataclass(frozen=True)
class Fp8Options:
    """search: scales tried within an octave of the largest weight's; 1 takes the largest weight as it is."""

    search: int = 12


def quantize(
    weight: Tensor,
    statistics: InputStatistics | None,
    scheme: WeightScheme,
    options: Fp8Options,
    scale_dtype: torch.dtype = torch.float32,
) -> Quantized:
    """weight [out, in] float32 -> float8_e4m3fn codes and scales in `scale_dtype`: [1, 1] for a tensor, [out, 1] for
    channels, [ceil(out/g), ceil(in/g)] for blocks. Statistics weigh the error of each column by its inputs' power."""
    cost = torch.ones_like(weight[0]) if statistics is None or statistics.gram is None else statistics.gram.diagonal()
    largest = _reduce(weight.abs(), scheme, "amax").clamp_min(1e-12)
    best_error = torch.full_like(largest, torch.inf)
    best_scale = torch.ones_like(largest)
    for step in range(options.search):
        # a larger scale than the maximum asks for only shifts the grid; a smaller one clips
        scale = stored_scale(largest / _LARGEST * 2 ** (step / options.search), scale_dtype)
        error = _reduce((weight - _values(weight, scale, scheme)).square_().mul_(cost), scheme, "sum")
        better = error < best_error
        best_error, best_scale = torch.where(better, error, best_error), torch.where(better, scale, best_scale)
    codes = _codes(weight, _spread(best_scale, scheme, weight))
    return Quantized(QTensor(codes, best_scale.to(scale_dtype), scheme))


def _codes(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight / scale).clamp_(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)


def _values(weight: Tensor, scale: Tensor, scheme: WeightScheme) -> Tensor:
    spread = _spread(scale, scheme, weight)
    return _codes(weight, spread).float() * spread


def _reduce(values: Tensor, scheme: WeightScheme, how: str) -> Tensor:
    """One value for everything that shares a scale, in the scale's shape; `how` is "amax" or "sum" (values >= 0)."""
    if scheme.granularity == "block":
        size, (rows, columns) = scheme.group_size, values.shape
        padded = torch.nn.functional.pad(values, (0, -columns % size, 0, -rows % size))
        blocks = padded.view(padded.shape[0] // size, size, padded.shape[1] // size, size)
        return blocks.amax((1, 3)) if how == "amax" else blocks.sum((1, 3))
    dims = (0, 1) if scheme.granularity == "tensor" else (1,)
    return values.amax(dims, keepdim=True) if how == "amax" else values.sum(dims, keepdim=True)


def _spread(scale: Tensor, scheme: WeightScheme, weight: Tensor) -> Tensor:
    """Scales so that they broadcast against the weight."""
    if scheme.granularity != "block":
        return scale
    size = scheme.group_size
    return scale.repeat_interleave(size, 0)[: len(weight)].repeat_interleave(size, 1)[:, : weight.shape[1]]


METHOD = Method(
    "fp8",
    Fp8Options,
    quantize,
    needs=lambda options: Needs(),
    kinds=("float",),
    granularities=("channel", "tensor", "block"),
)
