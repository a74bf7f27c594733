"""pair.py in Triton, and what float16 scales and integer ones make of it. All [rows of a program], float32."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _safe(numerator, denominator):
    usable = denominator > 0.0
    return tl.where(usable, numerator / tl.where(usable, denominator, 1.0), 0.0)


@triton.jit
def nearest(value, low, high):
    # a float32 this large has no room for fractions: adding it rounds to the nearest, ties to even
    return tl.minimum(tl.maximum(value, low), high) + 12582912.0 - 12582912.0


@triton.jit
def _solution(pull, stiff, pull_across, mixed, stiff_across):
    """Pair.solution."""
    determinant = stiff * stiff_across - mixed * mixed
    solvable = determinant > 1e-6 * stiff * stiff_across
    some = stiff > 0.0
    x = _safe(pull * stiff_across - pull_across * mixed, determinant)
    y = _safe(pull_across * stiff - pull * mixed, determinant)
    alone = tl.where(some, _safe(pull, stiff), 0.0)
    return tl.where(solvable, x, alone), tl.where(solvable, y, tl.where(some, 0.0, _safe(pull_across, stiff_across)))


@triton.jit
def _growth(x, y, pull, stiff, pull_across, mixed, stiff_across):
    """Pair.change."""
    return x * (x * stiff - 2 * pull) + y * (y * stiff_across - 2 * pull_across + 2 * x * mixed)


@triton.jit
def move_floats(d, dmin, pull, stiff, pull_across, mixed, stiff_across, AFFINE: tl.constexpr):
    """By how much d and dmin move, as float16 holds them, and by how much the error grows; 0 where it would not fall."""
    x, y = _solution(pull, stiff, pull_across, mixed, stiff_across)
    new = (d + x).to(tl.float16).to(tl.float32)
    usable = (tl.abs(new) < float("inf")) & (new != 0.0) & (d != 0.0)
    x = new - d
    if AFFINE:
        new_min = (dmin + y).to(tl.float16).to(tl.float32)
        usable = usable & (tl.abs(new_min) < float("inf"))
        y = new_min - dmin
    grown = _growth(x, y, pull, stiff, pull_across, mixed, stiff_across)
    better = usable & (grown < 0.0)
    return tl.where(better, x, 0.0), tl.where(better, y, 0.0), tl.where(better, grown, 0.0)


@triton.jit
def move_integers(
    sc, mc, blank, low, high, pull, stiff, pull_across, mixed, stiff_across, AFFINE: tl.constexpr
):  # fmt: skip
    """By how much a sub-block's integer scale and minimum move; 0 where the error would not fall."""
    x, _ = _solution(pull, stiff, pull_across, mixed, stiff_across)
    new = nearest(sc + x, low, high)
    x = new - sc
    y = tl.zeros_like(x)
    if AFFINE:
        y = nearest(mc + _safe(pull_across - x * mixed, stiff_across), low, high) - mc
    better = (_growth(x, y, pull, stiff, pull_across, mixed, stiff_across) < 0.0) & (new != 0.0) & (blank == 0)
    return tl.where(better, x, 0.0), tl.where(better, y, 0.0)
