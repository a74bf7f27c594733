"""MXFP4 and NVFP4 weights: E2M1 codes (0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives) with a scale for each group.

MXFP4: groups of 32, the scale a power of two (OCP Microscaling Formats v1.0, section 6.3, where the exponent is that of
the largest weight). NVFP4: groups of 16, the scale an E4M3 float divided by one float32 for the tensor (NVIDIA,
"Pretraining Large Language Models with NVFP4", 2025, and ModelOpt's nvfp4_tensor.py). Both take a group's scale from its
largest weight; with `search` NVFP4 tries neighbours too, for the least squared error of the group, and MXFP4 takes the next
power of two where the largest weight is nearer to that one's codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.core.codebooks import codebook, group_scale
from lowbit.core.contracts import Method, Needs, Quantized
from lowbit.core.qtensor import QTensor
from lowbit.core.scheme import WeightScheme
from lowbit.core.statistics import InputStatistics

_LARGEST_CODE = 6.0
_LARGEST_SCALE = 448.0
# between the largest code and the next that twice the scale would have. On SmolLM2 this gives less divergence than OCP's
# exponent (which clips to 6 what is almost 8), than never to clip, and than the least squared error of the group
_NEARER_TO_NEXT = 7.0
# shares of the largest weight that the largest code is put on
_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 1.1, 1.2, 1.3, 1.4, 1.5)


@dataclass(frozen=True)
class Fp4Options:
    """search: do better than the scale that the formats' own rule gives for the group's largest weight."""

    search: bool = True


def quantize(
    weight: Tensor,
    statistics: InputStatistics | None,
    scheme: WeightScheme,
    options: Fp4Options,
    scale_dtype: torch.dtype = torch.float32,
) -> Quantized:
    """weight [out, in] float32 -> the nearest codes and the scales of `choose_scales`, whatever `scale_dtype` says. Statistics
    weigh the error of each column by its inputs' power (nvfp4)."""
    cost = torch.ones_like(weight[0]) if statistics is None or statistics.gram is None else statistics.gram.diagonal()
    scale, extra = choose_scales(weight, scheme, options, cost)
    grouped = weight.view(weight.shape[0], -1, scheme.group_size)
    nearest = nearest_codes(grouped / group_scale(scheme.kind, scale, extra)[..., None])
    return Quantized(QTensor(nearest.view(weight.shape), scale, scheme, extra=extra))


def choose_scales(
    weight: Tensor, scheme: WeightScheme, options: Fp4Options, cost: Tensor
) -> tuple[Tensor, dict[str, Tensor] | None]:
    """(stored scales [out, groups], further tensors): uint8 exponents of bias 127 (mxfp4), or float8_e4m3fn that "global_scale"
    [1] float32 divides (nvfp4). cost: [in], of a unit of squared error in each column (nvfp4)."""
    grouped = weight.view(weight.shape[0], -1, scheme.group_size)
    if scheme.kind == "mxfp4":
        return _exponents(grouped, options), None
    largest = weight.abs().amax().clamp_min(1e-12)
    extra = {"global_scale": (_LARGEST_SCALE * _LARGEST_CODE / largest).reshape(1)}
    candidates = _fractions(grouped, extra["global_scale"], options)
    costs = cost.view(1, -1, scheme.group_size)
    return _least_error(grouped, costs, candidates, lambda scale: group_scale("nvfp4", scale, extra)), extra


def _least_error(grouped: Tensor, costs: Tensor, candidates: list[Tensor], value: Callable[[Tensor], Tensor]) -> Tensor:
    """The stored scale of each group [out, groups] whose rounding changes the group least."""
    book = codebook("mxfp4").to(grouped.device)
    best, lowest = candidates[0], torch.full(grouped.shape[:-1], torch.inf, device=grouped.device)
    for candidate in candidates:
        scale = value(candidate)[..., None]
        rounded = book[nearest_codes(grouped / scale).int()] * scale
        error = ((rounded - grouped).square() * costs).sum(-1)
        better = error < lowest
        lowest = torch.where(better, error, lowest)
        best = torch.where(better, candidate.float(), best.float()).to(candidate.dtype)
    return best


def _exponents(grouped: Tensor, options: Fp4Options) -> Tensor:
    """Biased exponents [out, groups]: the largest weight's own, less the 2 of the largest code 6 = 1.5 * 2^2."""
    largest = grouped.abs().amax(-1).clamp_min(2.0**-120)
    exponent = torch.frexp(largest).exponent - 1 - 2 + 127
    if options.search:
        exponent += (largest > _NEARER_TO_NEXT * group_scale("mxfp4", exponent, None)).int()
    return exponent.clamp(0, 254).to(torch.uint8)


def _fractions(grouped: Tensor, global_scale: Tensor, options: Fp4Options) -> list[Tensor]:
    """E4M3 scales; the smallest positive one instead of zero, which nothing could be divided by."""
    exact = grouped.abs().amax(-1) / _LARGEST_CODE * global_scale
    shares = _SHARES if options.search else _SHARES[:1]
    smallest = torch.finfo(torch.float8_e4m3fn).smallest_normal / 8
    return [(exact * share).clamp(smallest, _LARGEST_SCALE).to(torch.float8_e4m3fn) for share in shares]


def nearest_codes(scaled: Tensor) -> Tensor:
    """Nearest E2M1 codes, ties to the even code as hardware rounds: uint8, bit 3 is the sign."""
    magnitude = scaled.abs()
    code = torch.zeros_like(scaled, dtype=torch.uint8)
    # midpoints between neighbouring values; at a tie an odd lower code moves up to its even neighbour
    for lower, middle in enumerate((0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)):
        code += (magnitude >= middle) if lower % 2 else (magnitude > middle)
    return code | (torch.signbit(scaled).to(torch.uint8) << 3)


METHOD = Method(
    "fp4",
    Fp4Options,
    quantize,
    needs=lambda options: Needs(),
    kinds=("mxfp4", "nvfp4"),
    granularities=("group",),
)
