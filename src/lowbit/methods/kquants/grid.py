"""The grid a block type puts weights on, and rounding onto it.

A weight is `scale * levels[code] - minimum`: the levels are the type's own, scale and minimum belong to a sub-block.
A `Grid` holds what the file stores of scale and minimum; a method that wants other codes or scales than ggml's
reference (second-order rounding, refinement) makes its own Grid and codes and packs them.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lowbit.core.errors import FormatError
from lowbit.methods.kquants.arithmetic import round_clamped_
from lowbit.methods.kquants.loops import gpu_for


@dataclass(frozen=True)
class Grid:
    """Stored scales of `[rows, cols]` weights.

    `d`, `dmin`: float16 `[rows, cols / block]`; `scale_codes`, `min_codes`: int16 `[rows, cols / sub_block]`.
    scale = d * scale_codes and minimum = dmin * min_codes; a type without codes has scale = d, one without minimums
    has `dmin` None. Types 4_1 and 5_1 store the negated minimum: their `dmin` is -m. MXFP4's `d` is float32.
    """

    d: Tensor
    dmin: Tensor | None = None
    scale_codes: Tensor | None = None
    min_codes: Tensor | None = None

    def scale_min(self) -> tuple[Tensor, Tensor | None]:
        """Scale and minimum of every sub-block, float32 `[rows, cols / sub_block]`, exactly as they dequantize."""
        return _expand(self.d, self.scale_codes), None if self.dmin is None else _expand(self.dmin, self.min_codes)


def stored(part: Tensor | None, per_block: int) -> Tensor:
    """A part of a Grid that the type stores, as `[blocks, per_block]`; FormatError if the Grid lacks it."""
    if part is None:
        raise FormatError("This grid lacks scales or minimums that the type stores; it was made for another type.")
    return part.reshape(-1, per_block)


def _expand(super_scale: Tensor, codes: Tensor | None) -> Tensor:
    exact = super_scale.to(torch.float32)
    if codes is None:
        return exact
    return (exact.unsqueeze(-1) * codes.view(*exact.shape, -1)).flatten(-2)


def round_uniform(weights: Tensor, grid: Grid, low: int, high: int) -> Tensor:
    """Codes uint8 `[rows, cols]`: clamp(nearest_int((w + minimum) / scale), low, high) - low; level 0 at scale 0."""
    scale, minimum = grid.scale_min()
    gpu = gpu_for(weights)
    if gpu is not None:
        codes: Tensor = gpu.round_uniform(weights, scale, minimum, low, high)
        return codes
    blocks = weights.reshape(*scale.shape, -1)
    zero = (scale == 0).unsqueeze(-1)
    divisor = scale.unsqueeze(-1).masked_fill(zero, 1.0)
    values = blocks.div(divisor) if minimum is None else (blocks + minimum.unsqueeze(-1)).div_(divisor)
    values.masked_fill_(zero, 0.0)
    return round_clamped_(values, low, high).sub_(low).to(torch.uint8).view(weights.shape)


def round_levels(weights: Tensor, grid: Grid, levels: tuple[int, ...]) -> Tensor:
    """Codes uint8 `[rows, cols]` of the nearest of the ascending `levels`; the lower midpoint goes up, as in ggml."""
    scale, _ = grid.scale_min()
    blocks = weights.reshape(*scale.shape, -1)
    divisor = scale.unsqueeze(-1).masked_fill((scale == 0).unsqueeze(-1), torch.inf)
    return nearest_level(blocks / divisor, levels).view(weights.shape)


def nearest_level(values: Tensor, levels: tuple[int, ...]) -> Tensor:
    """Index uint8 of the nearest of the ascending `levels`, same shape as `values`; a tie goes to the upper level."""
    middles = [(a + b) / 2 for a, b in pairwise(levels)]
    boundaries = torch.tensor(middles, dtype=values.dtype, device=values.device)
    return torch.bucketize(values.contiguous(), boundaries, out_int32=True, right=True).to(torch.uint8)


def element_major(weights: Tensor, sub_block: int, per_super: int) -> Tensor:
    """`[rows, cols]` to `[sub_block, per_super * supers]`: sub-block j of super-block s is column j * supers + s."""
    return weights.reshape(-1, per_super, sub_block).permute(2, 1, 0).reshape(sub_block, -1).contiguous()


def row_major(per_sub_block: Tensor, rows: int, per_super: int) -> Tensor:
    """`[per_super * supers]` values, one a sub-block, to `[rows, cols / sub_block]`."""
    return per_sub_block.view(per_super, -1).T.contiguous().view(rows, -1)


def spread_importance(importance: Tensor, rows: int, sub_block: int, per_super: int) -> Tensor:
    """Importance `[cols]` in the layout of `element_major` for `rows` rows."""
    one_row = importance.reshape(-1, per_super, sub_block).permute(2, 1, 0)
    return one_row.unsqueeze(2).expand(-1, -1, rows, -1).reshape(sub_block, -1)


def zero_scale_columns(grid: Grid, per_super: int) -> tuple[Tensor, Tensor]:
    """Sub-blocks whose stored scale is 0: their flat index in row-major order, and in element-major order.

    Their codes have no influence on values, but ggml leaves there what the search put, and so do we.
    """
    scale, _ = grid.scale_min()
    flat = (scale == 0).view(-1).nonzero().squeeze(1)
    supers = scale.numel() // per_super
    return flat, flat % per_super * supers + flat // per_super


def patch_codes(codes: Tensor, flat: Tensor, replacement: Tensor) -> Tensor:
    """`codes` uint8 `[rows, cols]` with the sub-blocks `flat` `[K]` overwritten by element-major `[n, K]`, in place."""
    codes.view(-1, replacement.shape[0])[flat] = replacement.T.to(torch.uint8)
    return codes
