"""Rounding onto an affine integer grid: scales, zero points and codes. Shared by every integer method.

Shapes: weight [out, in]; scale and zero [out, groups]; `groups` [in] int64 names the group of each column.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.core.scheme import WeightScheme

# shrink factors tried for the range of a group; beyond these a least-squares step takes over
_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.72, 0.64)
_REFINEMENTS = 3


@dataclass(frozen=True)
class Grid:
    """An affine grid: value = scale * (code - zero). scale [out, groups] float32, exactly representable in the stored
    dtype; zero [out, groups] float32 whole numbers."""

    scale: Tensor
    zero: Tensor


def group_of_columns(columns: int, scheme: WeightScheme, device: torch.device) -> Tensor:
    """[in] int64: the group of each column when groups are consecutive."""
    return torch.arange(columns, device=device) // scheme.columns_per_scale(columns)


def to_codes(weight: Tensor, scale: Tensor, zero: Tensor, max_code: int) -> Tensor:
    """Nearest codes (float32 whole numbers) of `weight` for `scale` and `zero` that broadcast against it."""
    return torch.round(weight / scale + zero).clamp_(0, max_code)


def min_max_grid(weight: Tensor, scheme: WeightScheme, scale_dtype: torch.dtype) -> Grid:
    """The plain grid: symmetric from the largest magnitude, asymmetric from minimum and maximum (zero included)."""
    grouped = _grouped(weight, scheme)
    if scheme.symmetric:
        limit = grouped.abs().amax(-1)
        scale = limit / (scheme.max_code / 2)
        return Grid(*_stored(scale, torch.full_like(scale, scheme.middle), scale_dtype))
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    scale = (high - low) / scheme.max_code
    scale, _ = _stored(scale, scale, scale_dtype)
    return Grid(scale, torch.round(-low / scale).clamp_(0, scheme.max_code))


def search_grid(weight: Tensor, scheme: WeightScheme, scale_dtype: torch.dtype, importance: Tensor) -> Grid:
    """The grid that minimizes sum over columns of importance * error^2, group by group.

    importance: [in] or [out, in], non-negative. Ranges are shrunk by several factors; a symmetric grid has one code more
    below zero than above, so it is tried both ways round (a negative scale puts the far end on the other side).
    Each candidate is improved by a few rounds of: nearest codes, then the best scale for those codes in closed form.
    """
    grouped, cost = _grouped(weight, scheme), _grouped(importance.expand_as(weight), scheme)
    best_error = torch.full(grouped.shape[:-1], torch.inf, device=weight.device)
    best_scale, best_zero = torch.ones_like(best_error), torch.zeros_like(best_error)
    for scale, zero in _candidates(grouped, scheme):
        for _ in range(_REFINEMENTS):
            scale, zero = _stored(scale, zero, scale_dtype)
            offsets = to_codes(grouped, scale[..., None], zero[..., None], scheme.max_code) - zero[..., None]
            error = (cost * (grouped - offsets * scale[..., None]).square()).sum(-1)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
            weighted = cost * offsets
            power = (weighted * offsets).sum(-1)
            scale = torch.where(power > 0, (weighted * grouped).sum(-1) / power, scale)
    return Grid(best_scale, best_zero)


def _candidates(grouped: Tensor, scheme: WeightScheme) -> list[tuple[Tensor, Tensor]]:
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    if not scheme.symmetric:
        pairs = []
        for shrink in _SHRINK:
            scale = ((high - low) * shrink / scheme.max_code).clamp_min(1e-30)
            pairs.append((scale, torch.round(-low * shrink / scale).clamp(0, scheme.max_code)))
        return pairs
    middle = torch.full_like(low, scheme.middle)
    # the extremum with the larger magnitude goes to the end that has one code more
    extremum = torch.where(high > -low, -high, -low) / scheme.middle
    even = torch.maximum(high, -low) / (scheme.max_code / 2)
    return [(scale * shrink, middle) for scale in (extremum, even) for shrink in _SHRINK]


def _stored(scale: Tensor, zero: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scales as they will be stored: rounded to `dtype`, never zero, never beyond its range."""
    limits = torch.finfo(dtype)
    magnitude = scale.abs().clamp(limits.tiny, limits.max)
    signed = torch.where(scale < 0, -magnitude, magnitude)
    return signed.to(dtype).float(), zero


def stored_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 scales rounded to what `dtype` can hold, never zero."""
    return _stored(scale, scale, dtype)[0]


def _grouped(weight: Tensor, scheme: WeightScheme) -> Tensor:
    """[out, in] -> [out, groups, columns per scale]."""
    return weight.unflatten(1, (-1, scheme.columns_per_scale(weight.shape[1])))
