"""Weights that move along grids that stay, layers of one kind together: for training of codes alone.

learned_matrix.py and learned_blocks.py train scales beside codes, on any grid; this is for whole models, where every launch
and every byte counts: a few operations forward and back for all layers of a block that have grids of one kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit.core.primitives import are_consecutive
from lowbit.core.qtensor import QTensor
from lowbit.methods.learned_blocks import BlockMatrix

# how far into a code's cell, from its middle, a weight may start. Second-order methods choose many codes that are not the
# nearest: those weights start here, and must travel a while, not one step of noise, before they are given up
_CELL = 0.48


@dataclass(frozen=True)
class EvenGrid:
    """A matrix on grids of even steps: weight = scale * code - minimum.

    codes: uint8 [out, in], 0 to `top`. scale, minimum: float32 [out, groups]; a group is so many neighbouring columns.
    """

    codes: Tensor
    top: int
    scale: Tensor
    minimum: Tensor

    @staticmethod
    def of_tensor(tensor: QTensor) -> EvenGrid:
        """A layer of integers in groups or channels."""
        scale = tensor.scale.float()
        zero = tensor.zero.float() if tensor.zero is not None else torch.full_like(scale, tensor.scheme.middle)
        minimum, columns = scale * zero, tensor.column_groups()
        if not are_consecutive(columns, scale.shape[1]):
            scale, minimum = scale[:, columns], minimum[:, columns]
        return EvenGrid(tensor.codes, tensor.scheme.max_code, scale, minimum)

    @staticmethod
    def of_blocks(matrix: BlockMatrix) -> EvenGrid:
        """A matrix of a ggml type whose levels are even (`Codec.uniform`)."""
        scale, minimum = matrix.codec.scale_min(matrix.grid)
        lowest, highest = matrix.codec.levels[0], matrix.codec.levels[-1]
        return EvenGrid(matrix.codes, highest - lowest, scale, minimum - lowest * scale)

    def to(self, device: torch.device) -> EvenGrid:
        """The same matrix on another device."""
        return EvenGrid(self.codes.to(device), self.top, self.scale.to(device), self.minimum.to(device))

    @property
    def kind(self) -> tuple[int, ...]:
        """Matrices of one kind can be one, rows after rows."""
        return self.codes.shape[1], self.scale.shape[1], self.top


class MovingCodes:
    """Matrices of one kind in training, rows after rows. weights: [out, in] float32 each, what their codes stand for.

    position: [rows, in] float32, a leaf: where each weight stands among the codes. Groups of zeros stay zeros.
    """

    def __init__(self, weights: Sequence[Tensor], grids: Sequence[EvenGrid]) -> None:
        self.top = grids[0].top
        self.start = torch.cat([grid.codes for grid in grids])
        self.scale = torch.cat([grid.scale for grid in grids])
        self.minimum = torch.cat([grid.minimum for grid in grids])
        middle = self.start.float().view(*self.scale.shape, -1)
        scale, minimum = self.scale.unsqueeze(-1), self.minimum.unsqueeze(-1)
        wanted = torch.cat([weight.float() for weight in weights]).view(middle.shape)
        fixed = ((wanted == 0) & (middle * scale == minimum)).all(-1) | (self.scale == 0)
        # what a step along the grid changes: nothing where codes stay
        self.slope = torch.where(fixed, 0.0, self.scale)
        exact = torch.where(fixed.unsqueeze(-1), middle, (wanted + minimum) / scale)
        position = torch.minimum(torch.maximum(exact, middle - _CELL), middle + _CELL)
        self.position = position.view(self.start.shape).requires_grad_()

    def weight(self) -> Tensor:
        """[rows, in] float32, differentiable by straight-through rounding within the grid's ends."""
        parts = self.position, self.scale, self.minimum, self.slope, self.top
        found: Tensor = _OnGrid.apply(*parts)  # type: ignore[no-untyped-call]  # torch gives it no types
        return found

    @torch.no_grad()
    def codes(self) -> Tensor:
        """uint8 [rows, in]: where the weights stand now."""
        return self.position.round().clamp_(0, self.top).to(torch.uint8)


class _OnGrid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, position: Tensor, scale: Tensor, minimum: Tensor, slope: Tensor, top: int) -> Tensor:
        ctx.save_for_backward(position, slope)
        ctx.top = top
        code = position.round().clamp_(0, top).view(*scale.shape, -1)
        return code.mul_(scale.unsqueeze(-1)).sub_(minimum.unsqueeze(-1)).view(position.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        position, slope = ctx.saved_tensors
        by_group = gradients[0].reshape(*slope.shape, -1) * slope.unsqueeze(-1)
        inside = position.clamp(0, ctx.top).eq_(position)
        return by_group.view(position.shape).mul_(inside), None, None, None, None
