"""AWQ: input channels that matter are scaled up before rounding, so that less of their error is left.

Lin, Tang, Tang, Yang, Dang, Han, "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", 2023,
section 3.2. The scales are s = power^ratio (or power^ratio / magnitude^(1 - ratio) with the weights' magnitude, as
AutoAWQ and llm-compressor do by default) and the ratio is searched on a grid.

The paper prices a ratio by running the module. The output error of a linear layer is a quadratic form in the Gram matrix
H of its inputs, |(W - Q(W s) / s) X|^2 = tr(D H D^T), so one matrix that was collected once prices every ratio by a
matrix product; `objective="module"` runs the module instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lowbit.core.contracts import Needs
from lowbit.core.statistics import output_powers, tensor_float32_products
from lowbit.transforms.scaling import Problem, Transform, normalized


@dataclass(frozen=True)
class AwqOptions:
    """grid: ratios tried, evenly spaced in [0, 1). duo: scale by the weights' magnitude too ("both" tries each).
    objective: "gram" prices by the layers' output error, "module" by that of their module.
    """

    grid: int = 20
    duo: Literal["yes", "no", "both"] = "both"
    objective: Literal["gram", "module"] = "gram"


def search(problem: Problem, options: AwqOptions) -> Tensor:
    """Scales [channels] float32 with the least predicted output error; ones when nothing is better than them."""
    exact = problem.price if options.objective == "module" else None

    def price(scales: Tensor) -> float:
        columns = problem.place.to_columns(scales)
        return output_error(problem, columns) if exact is None else exact(columns)

    power, magnitude = input_magnitude(problem), weight_magnitude(problem)
    best = torch.ones_like(power)
    lowest = price(best)
    for duo in {"yes": (True,), "no": (False,), "both": (False, True)}[options.duo]:
        error, scales = _best_ratio(price, power, magnitude if duo else None, options.grid)
        if error < lowest:
            lowest, best = error, scales
    return best


def scales_of(power: Tensor, magnitude: Tensor | None, ratio: float) -> Tensor:
    """power^ratio, or with the weights' magnitude power^ratio / magnitude^(1 - ratio), around 1."""
    return normalized(power**ratio if magnitude is None else power**ratio / (magnitude ** (1 - ratio) + 1e-4))


def _best_ratio(
    price: Callable[[Tensor], float], power: Tensor, magnitude: Tensor | None, grid: int
) -> tuple[float, Tensor]:
    """(error, scales) of the best of `grid` ratios in [0, 1). The error is smooth in the ratio, so every fourth is priced
    first, then those in between around the best."""
    prices: dict[int, float] = {}
    for stride in (4, 2, 1):
        best = min(prices, key=prices.__getitem__) if prices else None
        steps = range(0, grid, 4) if best is None else (best - stride, best + stride)
        for step in steps:
            if 0 <= step < grid and step not in prices:
                prices[step] = price(scales_of(power, magnitude, step / grid))
    best = min(prices, key=prices.__getitem__)
    return prices[best], scales_of(power, magnitude, best / grid)


def input_magnitude(problem: Problem) -> Tensor:
    """[channels]: mean absolute input; of a channel that feeds several columns, their mean."""
    statistics = problem.statistics
    mean = statistics.absolute / max(statistics.tokens, 1)
    return problem.place.by_channel(mean).mean(0).clamp_min(1e-8)


def weight_magnitude(problem: Problem) -> Tensor:
    """[channels]: mean over outputs of |w| as a share of its row's largest, which rounding errors are proportional to."""
    weight = problem.weight.abs()
    share = (weight / weight.amax(1, keepdim=True).clamp_min(1e-12)).mean(0)
    return problem.place.by_channel(share).mean(0).clamp_min(1e-8)


def output_error(problem: Problem, columns: Tensor) -> float:
    """Mean squared change of the layers' outputs, summed over outputs, when `columns` [in] scale the weights."""
    gram = problem.statistics.gram
    assert gram is not None
    difference = problem.quantize(problem.weight * columns).div_(columns).sub_(problem.weight)
    # prices are only compared: with operands of 11 bits those of SmolLM2 change by 0.0002 of themselves at most
    with tensor_float32_products(gram.device):
        return output_powers(difference, gram).sum().item()


TRANSFORM = Transform(
    "awq",
    AwqOptions,
    search,
    needs=lambda options: Needs(gram=True),
    exact=lambda options: options.objective == "module",
)
