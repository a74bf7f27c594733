"""Code books: the values that the codes of 4 bit floating point and normal-float schemes stand for."""

from __future__ import annotations

import torch
from torch import Tensor

# OCP Microscaling formats v1.0, table 5: a sign, two exponent bits and one mantissa bit; code 8 + i is minus code i.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

# QLoRA (Dettmers et al. 2023), appendix E: quantiles of a standard normal, scaled to [-1, 1], with an exact zero.
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)

# bitsandbytes' own 4 bit float (bitsandbytes/functional.py, get_4bit_type "fp4"): the order of its hardware-free codes.
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)

_BOOKS = {
    "nvfp4": (*_E2M1, *(-value for value in _E2M1)),
    "mxfp4": (*_E2M1, *(-value for value in _E2M1)),
    "nf4": _NF4,
    "fp4": (*(value / 12 for value in _FP4), *(-value / 12 for value in _FP4)),
}


def codebook(kind: str) -> Tensor:
    """[16] float32: the value of each code of "nvfp4", "mxfp4", "nf4" or "fp4". Raises KeyError for another kind."""
    return torch.tensor(_BOOKS[kind], dtype=torch.float32)


def group_scale(kind: str, scale: Tensor, extra: dict[str, Tensor] | None) -> Tensor:
    """The float32 factor of each group, from what is stored.

    nvfp4: float8_e4m3fn scale divided by `extra["global_scale"]`, or times `extra["weight_scale_2"]`; mxfp4: uint8
    exponents with bias 127 (255 is NaN); nf4, fp4: the scale itself, or (double quantization) uint8 codes:
    nested_map[code] * nested_scale of 256 codes in a row + nested_offset, each from `extra`.
    """
    if kind in ("nf4", "fp4") and scale.dtype == torch.uint8:
        nested = extra or {}
        factors = nested["nested_scale"].repeat_interleave(256)[: scale.numel()].view(scale.shape)
        return nested["nested_map"][scale.int()] * factors + nested["nested_offset"]
    if kind == "mxfp4":
        exponent = scale.to(torch.int32)
        power = torch.ldexp(torch.ones_like(scale, dtype=torch.float32), exponent - 127)
        return torch.where(exponent == 255, torch.nan, power)
    if kind == "nvfp4" and extra is not None:
        if "weight_scale_2" in extra:
            return scale.float() * extra["weight_scale_2"].float()
        if "global_scale" in extra:
            return scale.float() / extra["global_scale"].float()
    return scale.float()
