"""A matrix of ggml blocks in training: codes and float scales move, integer scales of sub-blocks stay.

A weight is d * scale_code * level - dmin * min_code. Level and d are trained as AutoRound trains codes and scales; a
minimum moves all weights of its sub-blocks together, with the levels they have: moving weights against it instead would
leave every one where it was, and nothing to learn from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit.methods.kquants.codec import Codec
from lowbit.methods.kquants.grid import Grid
from lowbit.methods.learned_levels import Levels

_LARGEST_HALF = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class BlockMatrix:
    """What a file stores of one matrix. codes: uint8 [out, in]."""

    codec: Codec
    grid: Grid
    codes: Tensor

    def dequantize(self) -> Tensor:
        """[out, in] float32."""
        return self.codec.dequantize(self.grid, self.codes)

    def pack(self) -> Tensor:
        """The file's bytes, uint8 [out, bytes]."""
        return self.codec.pack(self.grid, self.codes)

    def rows(self, order: Tensor) -> BlockMatrix:
        """The matrix with row order[i] as its row i."""
        own = self.grid
        rest = [None if part is None else part[order] for part in (own.dmin, own.scale_codes, own.min_codes)]
        return BlockMatrix(self.codec, Grid(own.d[order], *rest), self.codes[order])


class LearnedBlocks:
    """learning.Learnable that starts from a BlockMatrix of `weight` [out, in] float32.

    stretches: d and, where the type has minimums, dmin, each [out, blocks]; none for MXFP4, whose scales are powers of two.
    Sub-blocks of zeros stay zeros.
    """

    def __init__(self, weight: Tensor, start: BlockMatrix) -> None:
        self.start = start
        grid, codec = start.grid, start.codec
        ascending = sorted(set(codec.levels))
        self.levels = Levels(torch.tensor(ascending, dtype=torch.float32, device=weight.device))
        self.codes = torch.tensor([codec.levels.index(level) for level in ascending], device=weight.device).byte()
        by_code = torch.tensor(codec.levels, dtype=torch.float32, device=weight.device)
        own = by_code[start.codes.int()]
        scale, minimum = grid.scale_min()
        self.shape = (*scale.shape, -1)  # [out, sub-blocks, columns of one]
        wanted = weight.view(self.shape) if minimum is None else weight.view(self.shape) + minimum.unsqueeze(-1)
        # codes of a scale of 0 mean nothing: they stay
        self.fixed = (_zeros(weight, own, scale, minimum) | (scale == 0)).unsqueeze(-1)
        wanted = torch.where(self.fixed, own.view(self.shape), wanted / scale.unsqueeze(-1))
        self.position = self.levels.begin(wanted.view(weight.shape), own).requires_grad_()
        trained = [part for part in (grid.d, grid.dmin) if part is not None and part.dtype == torch.float16]
        self.stretches = [torch.ones_like(part, dtype=torch.float32).requires_grad_() for part in trained]

    def weight(self) -> Tensor:
        """[out, in] float32: the dequantized weight, differentiable by straight-through rounding."""
        scale, minimum = self._grid().scale_min()
        weight = self.levels.rounded(self._value()) * scale.unsqueeze(-1)
        if minimum is not None:
            weight = weight - minimum.unsqueeze(-1)
        return weight.view(self.position.shape)

    @torch.no_grad()
    def result(self) -> BlockMatrix:
        """The trained numbers."""
        codes = self.codes[self.levels.rank(self._value())]
        codes = torch.where(self.fixed, self.start.codes.view(self.shape), codes).view(self.position.shape)
        grid = self._grid()
        d, dmin = (
            None if part is None or old is None else part.to(old.dtype)
            for part, old in ((grid.d, self.start.grid.d), (grid.dmin, self.start.grid.dmin))
        )
        assert d is not None
        return replace(self.start, grid=replace(grid, d=d, dmin=dmin), codes=codes)

    def _grid(self) -> Grid:
        """The stretched grid, its float scales rounded straight-through to what is stored."""
        own = self.start.grid
        if not self.stretches:
            return own
        d = _stored(own.d, self.stretches[0])
        return replace(own, d=d, dmin=None if own.dmin is None else _stored(own.dmin, self.stretches[1]))

    def _value(self) -> Tensor:
        """Values on the stretched grid, [out, sub-blocks, columns of one]: a scale that grows leaves a weight where it is, so
        its value shrinks."""
        position = self.position.view(self.shape)
        value = self.levels.value(torch.where(self.fixed, position.detach(), position))
        if not self.stretches:
            return value
        stretch = self.stretches[0]
        per_sub_block = stretch.unsqueeze(-1).expand(-1, -1, self.shape[1] // stretch.shape[1]).flatten(1)
        return value / per_sub_block.unsqueeze(-1)


def _zeros(weight: Tensor, levels: Tensor, scale: Tensor, minimum: Tensor | None) -> Tensor:
    """[out, sub-blocks]: those of zeros that are stored as zeros whatever their float scales are."""
    shape = (*scale.shape, -1)
    nothing = ((weight == 0) & (levels == 0)).view(shape).all(-1)
    return nothing if minimum is None else nothing & (minimum == 0)


def _stored(scale: Tensor, stretch: Tensor) -> Tensor:
    """scale * stretch as float16 holds it, in float32."""
    exact = (scale.float() * stretch).clamp(-_LARGEST_HALF, _LARGEST_HALF)
    return exact + (exact.detach().half() - exact.detach())
