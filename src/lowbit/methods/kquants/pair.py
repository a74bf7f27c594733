"""Two unknowns a row in closed form: a scale and a minimum that second-order rounding moves together."""

from __future__ import annotations

import torch
from torch import Tensor


class Pair:
    """The error as a quadratic in two unknowns a row: q moves by x * along + y * across. All [n, out]."""

    def __init__(self, along: Tensor, across: Tensor | None, hessian: Tensor, gradient: Tensor) -> None:
        turned = hessian @ along
        self.pull = (along * gradient).sum(0)
        self.stiff = (along * turned).sum(0)
        self.across = across is not None
        if across is not None:
            self.pull_across = (across * gradient).sum(0)
            self.mixed = (across * turned).sum(0)
            self.stiff_across = (across * (hessian @ across)).sum(0)

    def solution(self) -> tuple[Tensor, Tensor]:
        """Both unknowns at the minimum; where only one direction exists, that one."""
        alone = _safe(self.pull, self.stiff)
        if not self.across:
            return alone, torch.zeros_like(alone)
        determinant = self.stiff * self.stiff_across - self.mixed.square()
        solvable = determinant > 1e-6 * self.stiff * self.stiff_across
        x = _safe(self.pull * self.stiff_across - self.pull_across * self.mixed, determinant)
        y = _safe(self.pull_across * self.stiff - self.pull * self.mixed, determinant)
        only = _safe(self.pull_across, self.stiff_across)
        both = torch.where(self.stiff > 0, alone, 0.0)
        return torch.where(solvable, x, both), torch.where(solvable, y, torch.where(self.stiff > 0, 0.0, only))

    def second(self, x: Tensor) -> Tensor:
        """The best y for a given x."""
        return _safe(self.pull_across - x * self.mixed, self.stiff_across)

    def change(self, x: Tensor, y: Tensor | float) -> Tensor:
        """By how much the error grows."""
        grown = x * (x * self.stiff - 2 * self.pull)
        if not self.across:
            return grown
        return grown + y * (y * self.stiff_across - 2 * self.pull_across + 2 * x * self.mixed)


def _safe(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator > 0, numerator / denominator, 0.0)
