"""GPTQ: round one column at a time and let the columns still to come make up for the error.

Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", 2022, Algorithm 1. Additions, each switchable:
- static act-order: columns are taken by falling input power while groups stay where they are (AutoGPTQ's static_groups);
- grids are searched for the error that GPTQ cannot make up for (its own cost per column), not from minimum and maximum;
- refinement: with the codes fixed the best scales are a linear least-squares problem under the Hessian; with the scales
  fixed every code can be revisited by coordinate descent (QuantEase, Behdin et al. 2023). The two alternate;
- asymmetric calibration: the target is the original layer on the original inputs, although the inputs that arrive come
  from the quantized prefix (GPTAQ, Li et al. 2025). In closed form that only shifts the weights to be rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lowbit.core.codebooks import codebook, group_scale
from lowbit.core.contracts import Method, Needs, Quantized
from lowbit.core.primitives import Grid, group_of_columns, min_max_grid, search_grid
from lowbit.core.qtensor import QTensor
from lowbit.core.scheme import WeightScheme
from lowbit.core.statistics import InputStatistics, tensor_float32_products
from lowbit.methods import fp4
from lowbit.methods.columns import block_width, compensate, compensate_on_levels
from lowbit.methods.compiling import available
from lowbit.methods.hessian import Factor, factor
from lowbit.methods.refine import descend_codes, fit_scales
from lowbit.methods.rtn import make_qtensor

ActOrder = Literal["static", "desc", "none"]
Within = Callable[[Tensor, Tensor, slice], tuple[Tensor, Tensor]]
# columns in a group that the GPU's grid search takes; a row with one scale is left to PyTorch
LONGEST_GROUP = 1024
# rows are rounded this many weights at a time on a CPU
_WEIGHTS_AT_ONCE = 2**22


@dataclass(frozen=True)
class GptqOptions:
    """percdamp: share of the mean diagonal added to the Hessian's diagonal; ten times more on each failed factorization.
    act_order: "static" (loads everywhere), "desc" (groups move along, `desc_act`), or "none".
    search: search grids instead of min-max. refine: rounds of scale fitting and coordinate descent after the column loop, of
        integers.
    asymmetric: share (0 to 1) of the asymmetric calibration's correction that is applied; 0 turns it off and saves the
        second stream of activations. Shares near 1 fit the calibration text better and other text worse.
    """

    percdamp: float = 0.01
    act_order: ActOrder = "static"
    search: bool = True
    refine: int = 1
    asymmetric: float = 0.5


def quantize(
    weight: Tensor,
    statistics: InputStatistics,
    scheme: WeightScheme,
    options: GptqOptions,
    scale_dtype: torch.dtype = torch.float16,
) -> Quantized:
    """weight [out, in] float32, with the statistics of its inputs -> codes and scales in `scale_dtype` (MXFP4, NVFP4: in their
    own).

    Raises CalibrationError when the Hessian cannot be factored even with heavy damping.
    """
    if scheme.kind != "int":
        return _on_floats(weight, statistics, scheme, options)
    target, hessian, factored = _prepared(weight, statistics, options)
    moved = scheme.reordered
    groups = _groups_of(factored.order, scheme) if moved else group_of_columns(weight.shape[1], scheme, weight.device)
    # rows are independent from here on: a part of them at a time bounds the temporaries
    rows = len(weight) if weight.is_cuda else max(1, _WEIGHTS_AT_ONCE // weight.shape[1])
    hessian.diagonal().add_(factored.damp)
    parts = [
        _round_rows(part, original, hessian, factored, groups, scheme, options, scale_dtype)
        for part, original in zip(torch.split(target, rows), torch.split(weight, rows), strict=True)
    ]
    hessian.diagonal().sub_(factored.damp)
    codes = torch.cat([part for part, _ in parts])
    grid = Grid(torch.cat([part.scale for _, part in parts]), torch.cat([part.zero for _, part in parts]))
    tensor = make_qtensor(codes, grid, scheme, scale_dtype, groups if moved else None)
    return Quantized(tensor, _notes(factored.damp, hessian, options))


def _on_floats(weight: Tensor, statistics: InputStatistics, scheme: WeightScheme, options: GptqOptions) -> Quantized:
    """The same onto the codes of MXFP4 and NVFP4. Scales are chosen first, for the error that later columns cannot make up
    for, and stay: their own grids are too coarse to be fitted."""
    target, hessian, factored = _prepared(weight, statistics, options)
    scale, extra = fp4.choose_scales(target, scheme, fp4.Fp4Options(search=options.search), factored.cost)
    order, levels = factored.order, codebook(scheme.kind).unique().to(weight.device)
    groups = group_of_columns(weight.shape[1], scheme, weight.device)
    scales = group_scale(scheme.kind, scale, extra)[:, groups[order]]
    values = torch.empty_like(target)
    values[:, order] = round_columns(
        target[:, order],
        factored.upper,
        lambda part, inverse, here: compensate_on_levels(part, inverse, scales[:, here], levels),
    )
    tensor = QTensor(fp4.nearest_codes(values), scale, scheme, extra=extra)
    return Quantized(tensor, _notes(factored.damp, hessian, options))


def _prepared(weight: Tensor, statistics: InputStatistics, options: GptqOptions) -> tuple[Tensor, Tensor, Factor]:
    """(the weights to be rounded, the Hessian, which is the statistics' own matrix, and its factor)."""
    hessian = statistics.gram
    assert hessian is not None
    idle = hessian.diagonal() <= 0  # channels that calibration never saw: give them the mean, so they round to nearest
    hessian.diagonal()[idle] = hessian.diagonal().mean().clamp_min(1e-12)
    damp = options.percdamp * hessian.diagonal().mean().item()
    toward = _Toward(weight, statistics) if options.asymmetric else None
    factored = factor(hessian, _order(hessian, options), damp, statistics.world)
    return weight if toward is None else toward.original(factored, options.asymmetric), hessian, factored


def _round_rows(
    target: Tensor,
    weight: Tensor,
    hessian: Tensor,
    factored: Factor,
    groups: Tensor,
    scheme: WeightScheme,
    options: GptqOptions,
    scale_dtype: torch.dtype,
) -> tuple[Tensor, Grid]:
    """Codes [rows, in] uint8 and grid of some rows; the Hessian is damped."""
    order = factored.order
    by_group = torch.argsort(groups, stable=True) if scheme.reordered else slice(None)
    if options.search:
        grid = _searched(target[:, by_group], scheme, scale_dtype, factored.cost[by_group])
    else:
        grid = min_max_grid(weight[:, by_group], scheme, scale_dtype)
    codes = torch.empty_like(target)
    taken = groups[order]
    codes[:, order] = round_columns(
        target[:, order],
        factored.upper,
        lambda part, inverse, here: compensate(part, inverse, grid, taken[here], scheme.max_code),
    )
    for _ in range(options.refine):
        grid = Grid(fit_scales(target, codes, grid, groups, hessian, scale_dtype), grid.zero)
        codes = descend_codes(target, codes, grid, groups, hessian, scheme.max_code)
    return codes.to(torch.uint8), grid


def _searched(weight: Tensor, scheme: WeightScheme, scale_dtype: torch.dtype, cost: Tensor) -> Grid:
    if weight.is_cuda and scheme.columns_per_scale(weight.shape[1]) <= LONGEST_GROUP:
        from lowbit.methods import grid_kernels

        return grid_kernels.search_grid(weight, scheme, scale_dtype, cost)
    if not weight.is_cuda and available():
        from lowbit.methods import cpu_kernels

        return cpu_kernels.search_grid(weight, scheme, scale_dtype, cost)
    return search_grid(weight, scheme, scale_dtype, cost)


def round_columns(weight: Tensor, inverse_factor: Tensor, within: Within, block: int | None = None) -> Tensor:
    """The column loop (Algorithm 1 of the paper), lazily in blocks of columns.

    weight: [out, in] float32 in the order of processing. inverse_factor: [in, in], the upper Cholesky factor of the
    inverse Hessian. within: the loop within a block: its weights, its part of the factor and which columns it is -> what is
    kept of them, and their errors. Returns what is kept of all, [out, in] float32. Overwrites `weight`.
    """
    kept, block = torch.empty_like(weight), block or block_width(weight)
    for start in range(0, weight.shape[1], block):
        stop = min(start + block, weight.shape[1])
        here = slice(start, stop)
        kept[:, here], errors = within(weight[:, here], inverse_factor[here, here], here)
        # what the rounding of operands to 11 bits loses is a two-thousandth of what is added
        with tensor_float32_products(weight.device):
            weight[:, stop:].addmm_(errors, inverse_factor[start:stop, stop:], alpha=-1)
    return kept


def _order(hessian: Tensor, options: GptqOptions) -> Tensor:
    diagonal = hessian.diagonal()
    if options.act_order == "none":
        return torch.arange(len(diagonal), device=hessian.device)
    return torch.argsort(diagonal, descending=True, stable=True)


def _notes(damp: float, hessian: Tensor, options: GptqOptions) -> tuple[str, ...]:
    share = damp / hessian.diagonal().mean().item()
    if share < options.percdamp * 5:
        return ()
    return (
        f"the Hessian was not positive definite: damped by {share:.2g} of its mean diagonal, not {options.percdamp:g}",
    )


def _groups_of(order: Tensor, scheme: WeightScheme) -> Tensor:
    """Group of each column when groups are formed of consecutive columns in `order`."""
    groups = torch.empty_like(order)
    groups[order] = group_of_columns(len(order), scheme, order.device)
    return groups


class _Toward:
    """The weights W* that best turn arriving inputs X into the original outputs W X0: W* = W + W (X0 - X) X^T (H + d)^-1."""

    def __init__(self, weight: Tensor, statistics: InputStatistics) -> None:
        """Takes the cross matrix away from the statistics."""
        self.weight = weight
        cross = statistics.take_cross()
        # the product in the order that costs less: with few rows the cross matrix is used up before the Hessian is factored
        self.few = len(weight) < weight.shape[1]
        with tensor_float32_products(weight.device):
            self.left = weight @ cross if cross is not None and self.few else cross

    def original(self, factored: Factor, share: float) -> Tensor:
        """W* with a share of the correction [out, in]."""
        if self.left is None:
            return self.weight
        # of a correction that is small beside the weights 11 significant bits are enough (docs/performance.md)
        with tensor_float32_products(self.weight.device):
            correction = factored.times_inverse(self.left)
            if not self.few:
                correction = self.weight @ correction
        return correction.mul_(share).add_(self.weight)


METHOD = Method(
    "gptq",
    GptqOptions,
    quantize,
    needs=lambda options: Needs(gram=True, original=options.asymmetric > 0),
    reordered=lambda options: options.act_order == "desc",
    kinds=("int", "mxfp4", "nvfp4"),
    by_row=True,
)
