"""Experts in the pipeline: watched together, quantized one by one, and what becomes of those that saw too few tokens.

An expert's statistics come from the tokens that were sent to it. With fewer of them than a quarter of its inputs the
Hessian says little; such an expert is rounded to nearest, on grids that fit the inputs of all experts of the layer, and
reported. The original model may send a token elsewhere, so there is no asymmetric correction for experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lowbit.core.architectures import Architecture
from lowbit.core.contracts import Needs, Quantized
from lowbit.core.statistics import InputStatistics
from lowbit.methods import rtn
from lowbit.pipeline.plan import LayerPlan

# bytes of statistics of experts that are watched at a time: each further portion costs a pass over the calibration states
_AT_ONCE = 2**32
_FEWEST = 0.25  # tokens for each input
_WHY = "an expert saw fewer tokens than a quarter of its inputs"


def is_expert(architecture: Architecture, name: str) -> bool:
    """Whether a layer of a block belongs to one of several experts."""
    return bool(architecture.experts) and name.startswith(f"{architecture.experts}.")


def steps(
    architecture: Architecture, groups: Sequence[Sequence[str]], columns: Sequence[int]
) -> list[list[Sequence[str]]]:
    """Groups of layers that are watched together, in order: a group alone, or the same layers of many experts.

    columns: inputs of each group.
    """
    found: list[list[Sequence[str]]] = []
    room, last = 0, ""
    for group, inputs in zip(groups, columns, strict=True):
        kind = _kind(architecture, group[0])
        size = 4 * inputs * inputs
        if kind and kind == last and size <= room:
            found[-1].append(group)
            room -= size
        else:
            found.append([group])
            room, last = _AT_ONCE - size, kind
    return found


def needs_of_expert(needs: Needs) -> Needs:
    """What is watched for an expert of what its method would like."""
    return replace(needs, original=False)


def saw_too_few(statistics: InputStatistics) -> bool:
    """Whether an expert's own tokens cannot carry its method."""
    return statistics.tokens < _FEWEST * statistics.features


def of_all_experts(statistics: Sequence[InputStatistics]) -> InputStatistics:
    """The statistics of several experts' inputs as if one layer had been given them all."""
    first = statistics[0]
    joined = InputStatistics(first.features, first.largest.device, gram=first.gram is not None)
    for one in statistics:
        joined.tokens += one.tokens
        joined.absolute += one.absolute
        joined.largest = torch.maximum(joined.largest, one.largest)
        if joined.gram is not None and one.gram is not None:
            joined.gram.add_(one.gram, alpha=one.tokens)
    joined.finish()
    return joined


def round_unseen(weight: Tensor, shared: InputStatistics, plan: LayerPlan, scale_dtype: torch.dtype) -> Quantized:
    """An expert that saw too few tokens: weight [out, in] float32, statistics of all experts' inputs."""
    scheme = plan.scheme.weights
    if not plan.method.by_row or scheme is None or scheme.reordered or scheme.kind != "int":
        found: Quantized = plan.method.quantize(weight, shared, scheme, plan.options, scale_dtype)
        note = f"{_WHY}: quantized with the inputs of all experts"
    else:
        found = rtn.quantize(weight, shared, scheme, rtn.RtnOptions(search=True), scale_dtype)
        note = f"{_WHY}: rounded to nearest, weighted by the inputs of all experts"
    return Quantized(found.tensor, (*found.notes, note))


def _kind(architecture: Architecture, name: str) -> str:
    """Which layer of an expert this is, whichever expert; "" for other layers."""
    if not is_expert(architecture, name):
        return ""
    return name.removeprefix(f"{architecture.experts}.").partition(".")[2]
