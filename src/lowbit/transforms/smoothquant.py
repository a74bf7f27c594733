"""SmoothQuant: outliers of the inputs are moved into the weights, so that both can be rounded to 8 bits.

Xiao, Lin, Seznec, Wu, Demouth, Han, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language
Models", 2023, equation 4: inputs are divided by s = max|x|^alpha / max|w|^(1 - alpha). With `alpha="auto"` each place gets
the alpha with the least predicted output error, of the rounded weights (by the Gram matrix) and the rounded inputs (on a
sample of calibration tokens) together; no smoothing at all is among the choices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lowbit.core.contracts import Needs
from lowbit.core.statistics import output_powers
from lowbit.transforms.scaling import Problem, Transform

# None is no scaling
_ALPHAS = (None, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class SmoothQuantOptions:
    """alpha: share of the inputs' range that moves into the weights (0 to 1), or "auto" to search it for each place.
    linears: smooth also between linear layers (value -> output, up -> down), not only after norms as in the paper.
    """

    alpha: float | Literal["auto"] = 0.5
    linears: bool = False


def search(problem: Problem, options: SmoothQuantOptions) -> Tensor:
    """Scales [channels] float32."""
    ones = torch.ones(problem.place.channels, device=problem.weight.device)
    if not (problem.place.norm or options.linears):
        return ones
    if options.alpha != "auto":
        return smooth_scales(problem, options.alpha)
    tried = [ones if alpha is None else smooth_scales(problem, alpha) for alpha in _ALPHAS]
    return min(tried, key=lambda scales: predicted_error(problem, problem.place.to_columns(scales)))


def smooth_scales(problem: Problem, alpha: float) -> Tensor:
    """Equation 4. A channel that is never used or never weighted keeps its scale."""
    inputs = problem.place.by_channel(problem.statistics.largest).amax(0)
    weights = problem.place.by_channel(problem.weight.abs().amax(0)).amax(0)
    scales = inputs**alpha / weights.clamp_min(1e-12) ** (1 - alpha)
    usable = (inputs > 0) & (weights > 0) & torch.isfinite(scales)
    return torch.where(usable, scales.clamp(1e-5, 1e5), torch.ones_like(scales))


def predicted_error(problem: Problem, columns: Tensor) -> float:
    """Mean squared change of the outputs from rounding weights, plus from rounding each token's inputs to 8 bits."""
    statistics = problem.statistics
    assert statistics.gram is not None
    assert statistics.sample is not None
    scaled = problem.weight * columns
    difference = (scaled - problem.quantize(scaled)) / columns
    from_weights = output_powers(difference, statistics.gram).sum()
    inputs = statistics.sample.float() / columns
    step = inputs.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
    noise = inputs - (inputs / step).round() * step
    from_inputs = (noise @ scaled.T).square().sum(1).mean()
    return (from_weights + from_inputs).item()


TRANSFORM = Transform(
    "smoothquant",
    SmoothQuantOptions,
    search,
    needs=lambda options: Needs(gram=options.alpha == "auto", inputs=True, sample=options.alpha == "auto"),
)
