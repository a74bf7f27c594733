"""The values of a grid as a place to train on: positions between them, and straight-through rounding."""

from __future__ import annotations

import torch
from torch import Tensor

# how far into a code's cell, from its middle, a weight may start: its own rounding must give that code again
_CELL = 0.499


class Levels:
    """values: [n] float32, ascending and distinct. A position of 2.25 is a quarter of the way from the third to the fourth."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.even = bool((values.diff() == 1).all())

    def begin(self, wanted: Tensor, own: Tensor) -> Tensor:
        """The position nearest to the value `wanted` within the cell of the level `own`."""
        exact, middle = self.position(wanted), self.position(own)
        return torch.minimum(torch.maximum(exact, middle - _CELL), middle + _CELL)

    def position(self, values: Tensor) -> Tensor:
        """Where values lie between the levels."""
        above = torch.searchsorted(self.values, values.contiguous()).clamp(1, len(self.values) - 1)
        low, high = self.values[above - 1], self.values[above]
        return above - 1 + (values - low) / (high - low)

    def value(self, position: Tensor) -> Tensor:
        """The value at a position; differentiable."""
        if self.even:
            return position + self.values[0]
        below = position.detach().floor().long().clamp(0, len(self.values) - 2)
        low, high = self.values[below], self.values[below + 1]
        return low + (position - below) * (high - low)

    def rank(self, values: Tensor) -> Tensor:
        """int64: which level is nearest."""
        return self._nearest(values).long()

    def rounded(self, values: Tensor) -> Tensor:
        """The nearest level; its gradient is that of the values within the levels' range."""
        bounded = values.clamp(self.values[0], self.values[-1])
        nearest = self._nearest(values)
        level = nearest + self.values[0] if self.even else self.values[nearest.long()]
        return level + (bounded - bounded.detach())

    def _nearest(self, values: Tensor) -> Tensor:
        values = values.detach()
        place = values - self.values[0] if self.even else self.position(values)
        return place.clamp(0, len(self.values) - 1).round()
