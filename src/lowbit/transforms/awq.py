"""AWQ: input channels that matter are scaled up before rounding, so that less of their error is left.

Lin, Tang, Tang, Yang, Dang, Han, "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", 2023,
section 3.2. The scales are s = power^ratio (or power^ratio / magnitude^(1 - ratio) with the weights' magnitude, as
AutoAWQ and llm-compressor do by default) and the ratio is searched on a grid.

The paper prices a ratio by running the module. The output error of a linear layer is a quadratic form in the Gram matrix
H of its inputs, |(W - Q(W s) / s) X|^2 = tr(D H D^T), so one matrix that was collected once prices every ratio by a
matrix product; `objective="module"` runs the module instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lowbit.core.contracts import Needs
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
    best = torch.ones(problem.place.channels, device=problem.weight.device)
    price = problem.price if options.objective == "module" and problem.price is not None else None
    columns_of = problem.place.to_columns
    lowest = torch.inf
    for scales in candidates(problem, options):
        columns = columns_of(scales)
        error = price(columns) if price is not None else output_error(problem, columns)
        if error < lowest:
            lowest, best = error, scales
    return best


def candidates(problem: Problem, options: AwqOptions) -> list[Tensor]:
    """The scales of every ratio: ratio 0 of the single form is no scaling, and comes first so that it wins a tie."""
    power = input_magnitude(problem)
    magnitude = weight_magnitude(problem)
    duo = {"yes": (True,), "no": (False,), "both": (False, True)}[options.duo]
    found = [torch.ones_like(power)]
    for with_weights in duo:
        for step in range(options.grid):
            ratio = step / options.grid
            scales = power**ratio / (magnitude ** (1 - ratio) + 1e-4) if with_weights else power**ratio
            if with_weights or step:
                found.append(normalized(scales))
    return found


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
    difference = problem.weight - problem.quantize(problem.weight * columns) / columns
    return ((difference @ gram) * difference).sum().item()


TRANSFORM = Transform(
    "awq",
    AwqOptions,
    search,
    needs=lambda options: Needs(gram=True),
    exact=lambda options: options.objective == "module",
)
