"""Rounding onto an affine integer grid: scales, zero points and codes. Shared by every integer method.

Shapes: weight [out, in]; scale and zero [out, groups]; `groups` [in] int64 names the group of each column.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.core.scheme import WeightScheme

# shrink factors tried for the range of a group; least-squares steps take over from there. More of them lower the error of
# real weights by less than 0.5 percent
SHRINK = (1.0, 0.9, 0.8, 0.7)
REFINEMENTS = 3
# weights searched at a time: bounds the temporaries (about 10 float32 copies) and keeps them in the cache
_CHUNK = 2**18


@dataclass(frozen=True)
class Grid:
    """An affine grid: value = scale * (code - zero). scale [out, groups] float32, exactly representable in the stored
    dtype; zero [out, groups] float32 whole numbers."""

    scale: Tensor
    zero: Tensor


def group_of_columns(columns: int, scheme: WeightScheme, device: torch.device) -> Tensor:
    """[in] int64: the group of each column when groups are consecutive."""
    return torch.arange(columns, device=device) // scheme.columns_per_scale(columns)


def by_column(values: Tensor, groups: Tensor, *, consecutive: bool | None = None) -> Tensor:
    """[out, groups] -> [out, in]: what each column's group has.

    consecutive: whether `are_consecutive`, where it is known; asking a GPU would halt it, so there it is not asked.
    """
    count = values.shape[1]
    if consecutive is None:
        consecutive = not values.is_cuda and are_consecutive(groups, count)
    if consecutive:  # repeated in a third of the time of a gather, and a gradient is a sum instead of a scatter
        return values[:, :, None].expand(-1, -1, len(groups) // count).reshape(len(values), -1)
    return values[:, groups]


def are_consecutive(groups: Tensor, count: int) -> bool:
    """Whether each of `count` groups [in] is a run of equally many columns, in order."""
    if len(groups) % count:
        return False
    return torch.equal(groups, torch.arange(len(groups), device=groups.device) // (len(groups) // count))


def to_codes(weight: Tensor, scale: Tensor, zero: Tensor, max_code: int) -> Tensor:
    """Nearest codes (float32 whole numbers) of `weight` for `scale` and `zero` that broadcast against it."""
    return torch.div(weight, scale).add_(zero).round_().clamp_(0, max_code)


def min_max_grid(weight: Tensor, scheme: WeightScheme, scale_dtype: torch.dtype) -> Grid:
    """The plain grid: asymmetric from minimum and maximum (zero included), symmetric from the extremum.

    A symmetric grid has one code more on one side; the extremum goes there, which makes its scale negative when the
    extremum is positive, and uses all codes (llama.cpp's Q4_0 does the same).
    """
    grouped = _grouped(weight, scheme)
    if scheme.symmetric:
        scale = _extremum(grouped) / -scheme.middle
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
    rows = max(1, _CHUNK // weight.shape[1]) if not weight.is_cuda else len(weight)
    parts = [
        _search(_grouped(part, scheme), _grouped(cost, scheme), scheme, scale_dtype)
        for part, cost in zip(torch.split(weight, rows), torch.split(importance.expand_as(weight), rows), strict=True)
    ]
    return Grid(torch.cat([scale for scale, _ in parts]), torch.cat([zero for _, zero in parts]))


def _search(grouped: Tensor, cost: Tensor, scheme: WeightScheme, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    best_error = torch.full(grouped.shape[:-1], torch.inf, device=grouped.device)
    best_scale, best_zero = torch.ones_like(best_error), torch.zeros_like(best_error)
    for scale, zero in _candidates(grouped, scheme):
        for _ in range(REFINEMENTS):
            scale, zero = _stored(scale, zero, scale_dtype)
            offsets = to_codes(grouped, scale[..., None], zero[..., None], scheme.max_code).sub_(zero[..., None])
            weighted = cost * offsets
            power, match = (weighted * offsets).sum(-1), (weighted * grouped).sum(-1)
            # |w - s o|^2 = |w|^2 - 2 s <w, o> + s^2 <o, o>, and |w|^2 is the same for every candidate
            error = scale * (scale * power - 2 * match)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
            scale = torch.where(power > 0, match / power, scale)
    return best_scale, best_zero


def _candidates(grouped: Tensor, scheme: WeightScheme) -> list[tuple[Tensor, Tensor]]:
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    if not scheme.symmetric:
        pairs = []
        for shrink in SHRINK:
            scale = ((high - low) * shrink / scheme.max_code).clamp_min(1e-30)
            pairs.append((scale, torch.round(-low * shrink / scale).clamp(0, scheme.max_code)))
        return pairs
    middle = torch.full_like(low, scheme.middle)
    extremum = _extremum(grouped) / -scheme.middle
    even = torch.maximum(high, -low) / (scheme.max_code / 2)
    return [(scale * shrink, middle) for scale in (extremum, even) for shrink in SHRINK]


def _extremum(grouped: Tensor) -> Tensor:
    """The value with the largest magnitude of each group, with its sign."""
    low, high = grouped.amin(-1), grouped.amax(-1)
    return torch.where(high > -low, high, low)


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
    return weight.view(weight.shape[0], -1, scheme.columns_per_scale(weight.shape[1]))
