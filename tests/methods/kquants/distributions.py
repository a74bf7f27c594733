"""Weights that are ordinary, and weights that push the searches into their corners."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ROWS, COLS = 6, 1024
SHAPE = (ROWS, COLS)


def _normal(g: torch.Generator) -> Tensor:
    return torch.randn(SHAPE, generator=g)


def _uniform(g: torch.Generator) -> Tensor:
    return torch.rand(SHAPE, generator=g)


def _each_block(g: torch.Generator, size: int) -> Tensor:
    """Uniform numbers that are the same within blocks of `size`."""
    return torch.rand(ROWS, COLS // size, generator=g).repeat_interleave(size, dim=1)


def _one_spike(g: torch.Generator) -> Tensor:
    weights = _normal(g) * 1e-6
    weights[:, 7::256] = torch.randn(ROWS, COLS // 256, generator=g)
    return weights


DISTRIBUTIONS: dict[str, Callable[[torch.Generator], Tensor]] = {
    "normal": _normal,
    "checkpoint-like": lambda g: _normal(g) * 0.02,
    "heavy-tailed": lambda g: _normal(g) / _uniform(g).clamp(min=1e-3) * 0.01,
    "sparse": lambda g: _normal(g) * (_uniform(g) < 0.05),
    "zero blocks": lambda g: _normal(g) * (_each_block(g, 16) < 0.5),
    "one outlier a block": _one_spike,
    "scales far apart": lambda g: _normal(g) * 10 ** (7 * _each_block(g, 32) - 6),
    "positive": lambda g: _uniform(g) + 1,
    "negative": lambda g: -_uniform(g) - 0.5,
    "small integers": lambda g: (_uniform(g) * 9).floor() - 4,
    "constant blocks": lambda g: _each_block(g, 32) - 0.5,
    "zeros": lambda g: torch.zeros(SHAPE),
    "zeros of both signs": lambda g: torch.where(_uniform(g) < 0.5, 0.0, -0.0),
    "denormal": lambda g: _normal(g) * 1e-40,
    "tiny of all sizes": lambda g: _normal(g) * 10 ** (35 * _uniform(g) - 45),
    "of all sizes": lambda g: _normal(g) * 10 ** (32 * _uniform(g) - 30),
    "huge": lambda g: _normal(g) * 1e5,
    "near overflow": lambda g: _normal(g) * 1e30,
    "largest floats": lambda g: _normal(g).sign() * 3.4e38,
}

IMPORTANCES: dict[str, Callable[[torch.Generator], Tensor | None]] = {
    "none": lambda g: None,
    "uniform": lambda g: torch.rand(COLS, generator=g),
    "half zero": lambda g: torch.rand(COLS, generator=g) * (torch.rand(COLS, generator=g) < 0.5),
    "heavy-tailed": lambda g: torch.randn(COLS, generator=g).square() / torch.rand(COLS, generator=g),
    "all zero": lambda g: torch.zeros(COLS),
}


def generator(*parts: str) -> torch.Generator:
    """A generator seeded by names, the same in every run."""
    return torch.Generator().manual_seed(sum(ord(letter) * (at + 1) for at, letter in enumerate("/".join(parts))))
