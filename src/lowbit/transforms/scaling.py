"""Scales moved from one tensor to the next: norm -> linear, value -> output, up -> down. Shared by AWQ and SmoothQuant.

The input columns of the targets are multiplied by s and the channels of their source divided by it, so the function of
the block stays what it was. A transform only chooses s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit.core.architectures import Architecture, Scaling
from lowbit.core.contracts import Needs
from lowbit.core.statistics import InputStatistics


@dataclass(frozen=True)
class Place:
    """A Scaling of the architecture table in one block, with its sizes.

    source, targets: names within the block. channels: free scales (source channels). columns: inputs of the targets.
    head_dim, repeat: under grouped-query attention channel (k, d) of the values feeds the columns (k * repeat + r, d) of
    the output projection, for every r. first_row: where the scaled rows of a fused source begin. offset: what the norm adds
    to its weight. transposed: linear layers store [in, out]. norm: the source is a norm.
    """

    source: str
    targets: tuple[str, ...]
    channels: int
    columns: int
    head_dim: int
    repeat: int
    first_row: int
    offset: float
    transposed: bool
    norm: bool

    def to_columns(self, channels: Tensor) -> Tensor:
        """One value a channel [channels] -> one a column [columns]."""
        if self.repeat == 1:
            return channels
        heads = channels.view(-1, 1, self.head_dim)
        return heads.expand(-1, self.repeat, -1).reshape(-1)

    def by_channel(self, columns: Tensor) -> Tensor:
        """[columns] -> [repeat, channels]: the values of all columns that a channel feeds."""
        heads = columns.view(-1, self.repeat, self.head_dim) if self.repeat > 1 else columns.view(1, 1, -1)
        return heads.transpose(0, 1).reshape(self.repeat, -1)


@dataclass(frozen=True)
class Problem:
    """What a transform is given to choose the scales of one place.

    weight: [out, columns] float32, the quantized targets stacked. statistics: of their shared input.
    quantize: a quick rounding of a float32 matrix [out, columns] to the scheme, and back to float32.
    price: scales [columns] -> mean squared output error of the module that holds the targets, measured by running it;
    None where the targets' own outputs are the module's.
    """

    place: Place
    weight: Tensor
    statistics: InputStatistics
    quantize: Callable[[Tensor], Tensor]
    price: Callable[[Tensor], float] | None = None


@dataclass(frozen=True)
class Transform:
    """A way to choose scales. search(problem, options) -> scales [channels] float32, positive.

    options: a frozen dataclass with defaults. needs(options): statistics of the targets' inputs that it reads.
    exact(options): whether `problem.price` is wanted, which costs a run of the module for each call.
    """

    name: str
    options: type[Any]
    search: Callable[..., Tensor]
    needs: Callable[[Any], Needs]
    exact: Callable[[Any], bool] = lambda options: False


def places(architecture: Architecture, weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> list[Place]:
    """The scalings that can be done in a block with these `weights` (by name within it) of a model with this config."""
    # models that normalize after adding (OPT-350m) feed the norm's output to the residual too
    after = config.get("do_layer_norm_before") is False
    found = []
    for scaling in architecture.scalings:
        norm = weights[f"{scaling.source}.weight"].dim() == 1
        if norm and after:
            continue
        found.append(_place(scaling, architecture, weights, config))
    return [place for place in found if place is not None]


def _place(
    scaling: Scaling, architecture: Architecture, weights: Mapping[str, Tensor], config: Mapping[str, Any]
) -> Place | None:
    source = weights[f"{scaling.source}.weight"]
    rows = source.shape[-1] if architecture.transposed else source.shape[0]
    channels = rows // 2 if scaling.half else rows
    target = weights[f"{scaling.targets[0]}.weight"]
    columns = target.shape[0] if architecture.transposed else target.shape[1]
    heads = int(config.get("num_attention_heads") or 1)
    head_dim = int(config.get("head_dim") or int(config.get("hidden_size") or heads) // heads)
    repeat = columns // channels
    if repeat * channels != columns or (repeat > 1 and (not scaling.by_head or channels % head_dim)):
        return None
    return Place(
        scaling.source,
        scaling.targets,
        channels,
        columns,
        head_dim,
        repeat,
        rows - channels if scaling.half == "lower" else 0,
        architecture.norm_offset if source.dim() == 1 else 0.0,
        architecture.transposed,
        source.dim() == 1,
    )


def representable(weights: Mapping[str, Tensor], place: Place, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest scales that a norm stored in `dtype` can be divided by without rounding; other sources take any."""
    source = weights[f"{place.source}.weight"]
    if source.dim() != 1:
        return scales
    before = source.float() + place.offset
    after = (before / scales - place.offset).to(dtype).float() + place.offset
    exact = before / after
    usable = torch.isfinite(exact) & (exact > 0)
    return torch.where(usable, exact, torch.ones_like(exact))


def apply(weights: MutableMapping[str, Tensor], place: Place, scales: Tensor) -> None:
    """Move `scales` [channels] from the source to its targets: replaces their tensors by float32 ones."""
    for leaf in ("weight", "bias"):
        name = f"{place.source}.{leaf}"
        if name not in weights:
            continue
        scaled = weights[name].float().clone()
        offset = place.offset if leaf == "weight" else 0.0
        channels = scaled.T if place.transposed and scaled.dim() == 2 else scaled
        part = channels[place.first_row : place.first_row + place.channels]
        divisor = scales.view(-1, *[1] * (part.dim() - 1))
        part.add_(offset).div_(divisor).sub_(offset)
        weights[name] = scaled
    columns = place.to_columns(scales)
    for target in place.targets:
        name = f"{target}.weight"
        weight = weights[name].float()
        weights[name] = weight * (columns[:, None] if place.transposed else columns)


def scale_statistics_(statistics: InputStatistics, columns: Tensor) -> None:
    """Statistics of the inputs x / columns [in], from those of x: no second pass over the data is needed."""
    if statistics.gram is not None:
        statistics.gram.div_(columns).div_(columns[:, None])
    if statistics.cross is not None:
        statistics.cross.div_(columns).div_(columns[:, None])
    statistics.largest.div_(columns)
    statistics.absolute.div_(columns)
    if statistics.sample is not None:
        statistics.sample.div_(columns.to(statistics.sample.dtype))


def normalized(scales: Tensor) -> Tensor:
    """Scales around 1: divided by the geometric mean of their extremes, kept positive and finite."""
    scales = scales.clamp(1e-4, 1e4)
    return scales / (scales.max() * scales.min()).sqrt()
