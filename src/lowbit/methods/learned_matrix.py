"""A QTensor in training, on its own grid: integers with their scales, or codes of FP8, MXFP4 and NVFP4."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lowbit.core.codebooks import codebook, group_scale
from lowbit.core.primitives import are_consecutive, by_column, stored_scale
from lowbit.core.qtensor import QTensor
from lowbit.methods.learned_levels import Levels


class LearnedMatrix:
    """learning.Learnable that starts from the QTensor of `weight` [out, in] float32.

    stretches: the groups' scales [out, groups]; none where scales are no floats.
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
        self.consecutive = are_consecutive(self.groups, self.scale.shape[1])
        wanted = weight / self._by_column(self.scale) + self._by_column(self.zero)
        self.position = self.levels.begin(wanted, _values(start)).requires_grad_()
        self.stretches = [torch.ones_like(self.scale).requires_grad_()] if integer else []

    def weight(self) -> Tensor:
        """[out, in] float32: the dequantized weight, differentiable by straight-through rounding."""
        value = self.levels.rounded(self._value())
        scale = self.scale
        for stretch in self.stretches:
            scale = scale * stretch
            scale = scale + (stored_scale(scale.detach(), self.start.scale.dtype) - scale).detach()
        return (value - self._by_column(self.zero)) * self._by_column(scale)

    @torch.no_grad()
    def result(self) -> QTensor:
        """The trained numbers."""
        codes = self.codes[self.levels.rank(self._value())]
        if not self.stretches:
            return replace(self.start, codes=codes)
        dtype = self.start.scale.dtype
        return replace(self.start, codes=codes, scale=stored_scale(self.scale * self.stretches[0], dtype).to(dtype))

    def _value(self) -> Tensor:
        """Values on the stretched grid: a scale that grows leaves a weight where it is, so its value shrinks."""
        value = self.levels.value(self.position)
        for stretch in self.stretches:
            zero = self._by_column(self.zero)
            value = (value - zero) / self._by_column(stretch) + zero
        return value

    def _by_column(self, values: Tensor) -> Tensor:
        return by_column(values, self.groups, consecutive=self.consecutive)


def _grid(start: QTensor, device: torch.device) -> tuple[Levels, Tensor]:
    """(the levels, the code [n] of each)."""
    kind = start.scheme.kind
    if kind == "int":
        codes = torch.arange(start.scheme.max_code + 1, device=device)
        return Levels(codes.float()), codes.to(torch.uint8)
    if kind == "float":
        bytes_ = torch.arange(256, dtype=torch.uint8, device=device)
        values = bytes_.view(torch.float8_e4m3fn).float()
        levels = torch.tensor(sorted(set(values[values.isfinite()].tolist())), device=device)
        return Levels(levels), levels.to(torch.float8_e4m3fn)
    book = codebook(kind).to(device)
    levels = torch.tensor(sorted(set(book.tolist())), device=device)
    return Levels(levels), torch.stack([(book == level).nonzero()[0, 0] for level in levels]).to(torch.uint8)


def _values(start: QTensor) -> Tensor:
    """The value of every code."""
    if start.scheme.kind in ("int", "float"):
        return start.codes.float()
    return codebook(start.scheme.kind).to(start.codes.device)[start.codes.int()]
