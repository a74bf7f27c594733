"""Scales of a layer's inputs that are found while calibrating and stored beside its weights."""

from __future__ import annotations

from dataclasses import replace

import torch

from lowbit.core.contracts import Quantized
from lowbit.core.scheme import Scheme
from lowbit.core.statistics import InputStatistics

# largest code of an input: int8, float8_e4m3fn
_LARGEST_CODE = {"int": 127.0, "float": 448.0}
# largest float8_e4m3fn times largest E2M1: what NVFP4's scale of the whole tensor maps the largest input to
_NVFP4_RANGE = 448.0 * 6.0


def with_input_scale(
    quantized: Quantized, statistics: InputStatistics, scheme: Scheme, scale_dtype: torch.dtype
) -> Quantized:
    """The same numbers with what QTensor.extra calls "input_scale" (in `scale_dtype`) or, for NVFP4 activations,
    "input_global_scale" (float32): the largest input that calibration saw becomes the largest code."""
    assert scheme.activations is not None
    largest = statistics.largest.max().clamp_min(1e-6).reshape(1)
    if scheme.activations.kind == "nvfp4":
        extra = {"input_global_scale": _NVFP4_RANGE / largest}
    else:
        extra = {"input_scale": (largest / _LARGEST_CODE[scheme.activations.kind]).to(scale_dtype)}
    tensor = replace(quantized.tensor, extra={**(quantized.tensor.extra or {}), **extra})
    return Quantized(tensor, quantized.notes)
