"""Second-order rounding onto ggml's grids: smaller layer output errors in the same bytes.

Every row minimizes (w - q) H (w - q)^T, with H the Hessian of the layer's inputs, over everything that its blocks store:
1. a grid from ggml's own search, told what an error in each column costs (see Factor.cost);
2. GPTQ's column loop onto that fixed grid (Frantar et al. 2022), the strongest inputs first;
3. sweeps of exact coordinate descent: super-block scale and minimum (two unknowns, closed form, rounded to float16),
   the integer scale and minimum of every sub-block (closed form, rounded), then every code (QuantEase, Behdin et al.
   2023). Each move is taken only where it lowers the error, so a sweep never makes a row worse.
The result is a plain block of its type: nothing in a runtime knows of it.

Tensors are column-major in here, [in, out], so that one column of the matrix is contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.core.statistics import tensor_float32_products
from lowbit.methods.kquants.codec import CODECS, Codec
from lowbit.methods.kquants.curvature import Curvature
from lowbit.methods.kquants.grid import Grid
from lowbit.methods.kquants.rows import encode
from lowbit.methods.kquants.rows_state import RowsState

_LAZY = 128
_CHUNK_ROWS = 1024  # enough work a call, small enough for all cores to have some
# weights that a GPU rounds at a time: about a dozen float32 copies of them are in its memory
CUDA_WEIGHTS = 1 << 26


@dataclass(frozen=True)
class SecondOrderOptions:
    """damping: see factor_gram. sweeps: at most so many; tolerance: stop when one lowers the error by less than this share.
    asymmetric: share of the correction towards the original model's outputs (see toward_original) that callers apply.
    """

    damping: float = 0.03
    sweeps: int = 8
    tolerance: float = 1e-3
    asymmetric: float = 0.5


def quantize(
    type_name: str, weights: Tensor, curvature: Curvature, options: SecondOrderOptions | None = None
) -> tuple[Grid, Tensor]:
    """Grid and codes (uint8 [out, in]) of ggml type `type_name` for weights [out, in] float32; pack with its codec."""
    options = options or SecondOrderOptions()
    codec = CODECS[type_name]
    if weights.is_cuda:
        pieces = torch.chunk(weights, -(-weights.numel() // CUDA_WEIGHTS))
        parts = [_quantize_rows(codec, rows, curvature, options) for rows in pieces]
    else:
        # rows are independent, and calls on columns too small to be divided: cores take a piece each. How rows are
        # divided does not depend on the number of cores, so neither do the bytes
        pieces = torch.chunk(weights, -(-weights.shape[0] // _CHUNK_ROWS))
        with ThreadPoolExecutor(torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            parts = list(pool.map(lambda rows: _quantize_rows(codec, rows, curvature, options), pieces))
    return _join([grid for grid, _ in parts]), torch.cat([codes for _, codes in parts])


def split(grid: Grid, codes: Tensor, rows: Sequence[int]) -> list[tuple[Grid, Tensor]]:
    """Grid and codes of matrices that were rounded as one, `rows` each."""

    def pieces(part: Tensor | None) -> Sequence[Tensor | None]:
        return [None] * len(rows) if part is None else torch.split(part, list(rows))

    parts = zip(
        torch.split(grid.d, list(rows)), *map(pieces, (grid.dmin, grid.scale_codes, grid.min_codes)), strict=True
    )
    return [(Grid(*part), own) for part, own in zip(parts, torch.split(codes, list(rows)), strict=True)]


def _quantize_rows(
    codec: Codec, weights: Tensor, curvature: Curvature, options: SecondOrderOptions
) -> tuple[Grid, Tensor]:
    grid, nearest = _ggmls_own(codec, weights.contiguous(), curvature.factored.cost)
    target = weights.T.contiguous()
    state = RowsState(codec, grid, target)
    state.set_levels(_round_columns(state, target, curvature))
    # rows that compensation did not help (few columns matter, or the grid is exact) start from nearest
    rounded = RowsState(codec, grid, target, nearest)
    with tensor_float32_products(weights.device):
        error, plain = state.error(curvature.hessian), rounded.error(curvature.hessian)
    state.set_levels(torch.where(error <= plain, state.levels, rounded.levels))
    before = torch.minimum(error, plain).sum()
    for _ in range(options.sweeps):
        after = before + state.sweep(curvature.hessian)
        if after >= before * (1 - options.tolerance):
            break
        before = after
    return state.grid(), state.codes()


def _ggmls_own(codec: Codec, weights: Tensor, importance: Tensor) -> tuple[Grid, Tensor]:
    """ggml's grid and codes; on a CPU by way of its bytes, which C finds faster."""
    if weights.is_cuda:
        return codec.choose(weights, importance)
    return codec.unpack(encode(codec.ggml_type, weights, importance))


def _round_columns(state: RowsState, target: Tensor, curvature: Curvature) -> Tensor:
    """GPTQ's loop over `target` [in, out] onto the state's grid; levels float32 [in, out]."""
    order, factor = curvature.factored.order, curvature.factored.upper
    weight = target[order]
    scale, minimum = state.column_grid(order)
    levels = torch.empty_like(weight)
    for start in range(0, len(order), _LAZY):
        stop = min(start + _LAZY, len(order))
        here, own = slice(start, stop), factor[start:stop, start:stop]
        levels[here], errors = _round_stretch(state, weight[here], scale[here], minimum[here], own)
        weight[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    unordered = torch.empty_like(levels)
    unordered[order] = levels
    return unordered


def _round_stretch(
    state: RowsState, weight: Tensor, scale: Tensor, minimum: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor]:
    """The loop over a few columns [n, out], `weight` changed in place: levels, and errors that later columns have to make
    up for."""
    if state.kernels is not None:
        found: tuple[Tensor, Tensor] = state.kernels.compensate(
            weight, factor, scale, minimum, state.codec.levels[0], state.codec.levels[-1]
        )
        return found
    levels, errors = torch.empty_like(weight), torch.empty_like(weight)
    for j in range(len(weight)):
        levels[j] = state.nearest(weight[j], scale[j], minimum[j])
        errors[j] = (weight[j] - (scale[j] * levels[j] - minimum[j])) / factor[j, j]
        weight[j + 1 :].addr_(factor[j, j + 1 :], errors[j], alpha=-1)
    return levels, errors


def _join(grids: list[Grid]) -> Grid:
    def cat(name: str) -> Tensor | None:
        parts = [getattr(grid, name) for grid in grids]
        return None if parts[0] is None else torch.cat(parts)

    return Grid(torch.cat([grid.d for grid in grids]), cat("dmin"), cat("scale_codes"), cat("min_codes"))
