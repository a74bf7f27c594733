"""Learned rounding: the codes and scales of a whole block are trained so that the block's output stays what it was.

Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs" (AutoRound), 2023: signed
gradient steps on where each weight rounds to and on its group's range, through straight-through rounding. What differs:
- training starts from another method's solution (GPTQ) instead of round-to-nearest, and a block that did not get better
  on held-out windows keeps that start;
- the target is the original block on the original inputs, so the block also makes up for the blocks before it;
- tokens whose states are hundreds of times larger than the rest (attention sinks) do not drown the loss: every token's
  error is weighed against what the block itself adds to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit.core.codebooks import codebook, group_scale
from lowbit.core.primitives import stored_scale
from lowbit.core.qtensor import QTensor

# how far into a code's cell, from its middle, a weight may start: its own rounding must give that code again
_CELL = 0.499


@dataclass(frozen=True)
class Learned:
    """The better of start and end by layer, and the loss on held-out windows before and after."""

    tensors: dict[str, QTensor]
    before: float
    after: float

    @property
    def kept_start(self) -> bool:
        """Whether training did not help."""
        return self.after >= self.before


class LearnedMatrix:
    """One linear layer in training, on the grid of the QTensor that it starts from.

    position: [out, in] float32, where each weight stands on the sorted values of the grid, in units of one step.
    stretch: [out, groups] float32, the group's scale as a multiple of the starting one; None where scales are no floats.
    """

    def __init__(self, weight: Tensor, start: QTensor) -> None:
        self.start = start
        self.groups = start.column_groups()
        self.scale = group_scale(start.scheme.kind, start.scale, start.extra)
        integer = start.scheme.kind == "int"
        self.levels, self.codes = _grid(start, weight.device)
        self.zero = torch.zeros_like(self.scale)
        if integer:
            self.zero = start.zero.float() if start.zero is not None else self.zero + start.scheme.middle
        exact = _position(weight / self.scale[:, self.groups] + self.zero[:, self.groups], self.levels)
        begin = _position(start.codes.float() if integer else self._values(start), self.levels)
        # the place within the starting code's cell that is nearest to the original weight
        self.position = torch.minimum(torch.maximum(exact, begin - _CELL), begin + _CELL).requires_grad_()
        self.stretch = torch.ones_like(self.scale).requires_grad_() if integer else None

    def weight(self) -> Tensor:
        """[out, in] float32: the dequantized weight, differentiable by straight-through rounding."""
        place = self._place()
        value = self.levels[place.detach().round().long()] + (place - place.detach())
        scale = self.scale
        if self.stretch is not None:
            scale = scale * self.stretch
            scale = scale + (stored_scale(scale.detach(), self.start.scale.dtype) - scale).detach()
        return (value - self.zero[:, self.groups]) * scale[:, self.groups]

    @torch.no_grad()
    def qtensor(self) -> QTensor:
        """The trained numbers."""
        codes = self.codes[self._place().round().long()]
        if self.stretch is None:
            return replace(self.start, codes=codes)
        dtype = self.start.scale.dtype
        return replace(self.start, codes=codes, scale=stored_scale(self.scale * self.stretch, dtype).to(dtype))

    def _place(self) -> Tensor:
        """Positions on the stretched grid."""
        place = self.position
        if self.stretch is not None:
            zero = self.zero[:, self.groups]
            place = (place - zero) / self.stretch[:, self.groups] + zero
        return place.clamp(0, len(self.levels) - 1)

    def _values(self, start: QTensor) -> Tensor:
        if start.scheme.kind == "float":
            return start.codes.float()
        return codebook(start.scheme.kind).to(start.codes.device)[start.codes.int()]


def _grid(start: QTensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """(values [n] float32, ascending and distinct; the code [n] of each)."""
    kind = start.scheme.kind
    if kind == "int":
        codes = torch.arange(start.scheme.max_code + 1, device=device)
        return codes.float(), codes.to(torch.uint8)
    if kind == "float":
        bytes_ = torch.arange(256, dtype=torch.uint8, device=device)
        values = bytes_.view(torch.float8_e4m3fn).float()
        levels = values[values.isfinite()].unique()
        return levels, levels.to(torch.float8_e4m3fn)
    book = codebook(kind).to(device)
    levels = book.unique()
    return levels, torch.stack([(book == level).nonzero()[0, 0] for level in levels]).to(torch.uint8)


def _position(values: Tensor, levels: Tensor) -> Tensor:
    """Where values lie between the levels: 2.25 is a quarter of the way from the third to the fourth."""
    above = torch.searchsorted(levels, values.contiguous()).clamp(1, len(levels) - 1)
    low, high = levels[above - 1], levels[above]
    return above - 1 + (values - low) / (high - low)


def learn(
    matrices: Mapping[str, LearnedMatrix],
    run: Callable[[Mapping[str, Tensor], Tensor], Tensor],
    inputs: Callable[[Tensor], Tensor],
    targets: Callable[[Tensor], Tensor],
    windows: int,
    *,
    steps: int,
    batch: int,
    reach: float,
    scale_reach: float,
    seed: int,
) -> Learned:
    """Train the matrices of one block.

    run(weights [out, in] by layer, hidden) -> the block's output. inputs, targets: window indices -> hidden states
    [batch, tokens, hidden]. A batch of windows is held out. reach: how far, in steps of the grid, a weight can travel in
    all; scale_reach: likewise a scale, as a share of itself.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(windows, generator=generator)
    held_out, training = order[:batch], order[batch:]

    def held_out_loss(tensors: Mapping[str, QTensor]) -> float:
        with torch.no_grad():
            hidden = inputs(held_out)
            output = run({name: tensor.dequantize() for name, tensor in tensors.items()}, hidden)
            return _loss(output, hidden, targets(held_out)).item()

    start = {name: matrix.start for name, matrix in matrices.items()}
    before = held_out_loss(start)
    positions = [matrix.position for matrix in matrices.values()]
    stretches = [matrix.stretch for matrix in matrices.values() if matrix.stretch is not None]
    for step in range(steps):
        chosen = training[torch.randint(len(training), (batch,), generator=generator)]
        hidden = inputs(chosen)
        with torch.enable_grad():
            loss = _loss(run({name: one.weight() for name, one in matrices.items()}, hidden), hidden, targets(chosen))
            gradients = torch.autograd.grad(loss, positions + stretches)
        # linear decay: all steps together travel `reach`
        rate = 2 * (1 - step / steps) / steps
        with torch.no_grad():
            for position, gradient in zip(positions, gradients, strict=False):
                position.sub_(gradient.sign_(), alpha=reach * rate)
            for stretch, gradient in zip(stretches, gradients[len(positions) :], strict=True):
                stretch.sub_(gradient.sign_(), alpha=scale_reach * rate)
    trained = {name: matrix.qtensor() for name, matrix in matrices.items()}
    after = held_out_loss(trained)
    return Learned(trained if after < before else start, before, after)


def _loss(output: Tensor, hidden: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of the squared error, relative to what the block adds to the token, or typically adds."""
    error = (output.float() - target.float()).square().mean(-1)
    power = (target.float() - hidden.float()).square().mean(-1)
    return (error / power.clamp_min(power.median())).mean()
