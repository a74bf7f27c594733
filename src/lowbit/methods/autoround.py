"""Learned rounding from a good start: GPTQ (FP8: rounding to nearest) first, then whole blocks are trained.

The training is lowbit.methods.learning; this file says how it starts and what can be set.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.core.contracts import Method, Needs, Quantized
from lowbit.core.scheme import WeightScheme
from lowbit.core.statistics import InputStatistics
from lowbit.methods import fp8, gptq


@dataclass(frozen=True)
class AutoroundOptions(gptq.GptqOptions):
    """Those of the GPTQ that it starts from, and of the training: steps: gradient steps a block. batch: windows a step,
    and windows held out. reach: how far a weight can travel in all steps, in steps of its grid. scale_reach: likewise a
    scale, as a share of itself. seed: which windows when."""

    refine: int = 0
    steps: int = 100
    batch: int = 8
    reach: float = 0.5
    scale_reach: float = 0.1
    seed: int = 0


def quantize(
    weight: Tensor,
    statistics: InputStatistics,
    scheme: WeightScheme,
    options: AutoroundOptions,
    scale_dtype: torch.dtype = torch.float16,
) -> Quantized:
    """The start: weight [out, in] float32 -> codes and scales, as gptq or fp8 choose them. Raises CalibrationError."""
    if scheme.kind == "float":
        return fp8.quantize(weight, statistics, scheme, fp8.Fp8Options(), scale_dtype)
    return gptq.quantize(weight, statistics, scheme, options, scale_dtype)


METHOD = Method(
    "autoround",
    AutoroundOptions,
    quantize,
    # the original model's states are the targets, whatever the start makes of them
    needs=lambda options: Needs(gram=True, original=True),
    reordered=lambda options: options.act_order == "desc",
    kinds=("int", "float", "mxfp4", "nvfp4"),
    learns=True,
)
