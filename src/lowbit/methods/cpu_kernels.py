"""The inner loops of GPTQ on a CPU, compiled by numba where that is installed (the extra `cpu`).

Rows are independent: a row's columns stay in the first cache while the loop walks through them, and each thread takes its
part of the rows. In PyTorch the same loops take about ten calls a column, and go through memory for each. The results are
those of columns.py and primitives.search_grid but for float32 rounding of sums.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowbit.core.primitives import REFINEMENTS, SHRINK, Grid
from lowbit.core.scheme import WeightScheme
from lowbit.methods.compiling import compiled

# mantissa bits of a float32 that a stored scale lacks
_DROPPED = {torch.float16: 13, torch.bfloat16: 16, torch.float32: 0}
_LEAST_ROWS = 16  # that are worth a thread


def compensate(weight: Tensor, factor: Tensor, scale: Tensor, zero: Tensor, max_code: int) -> tuple[Tensor, Tensor]:
    """columns.compensate with scale and zero [out, n] of every column."""
    given = [_array(tensor) for tensor in (weight, factor, scale, zero)]
    codes, errors = torch.empty(weight.shape), torch.empty(weight.shape)
    results = (codes.numpy(), errors.numpy())
    _by_rows(len(weight), lambda rows: _compensate(rows.start, rows.stop, *given, np.float32(max_code), *results))
    return codes, errors


def descend_(gradient: Tensor, hessian: Tensor, scale: Tensor, zero: Tensor, codes: Tensor, max_code: int) -> Tensor:
    """columns.descend_ with scale and zero [out, n] of every column."""
    given = [_array(tensor) for tensor in (gradient, hessian, scale, zero)]
    new, moved = codes.contiguous().clone(), torch.empty(codes.shape)
    results = (new.numpy(), moved.numpy())
    _by_rows(len(codes), lambda rows: _descend(rows.start, rows.stop, *given, np.float32(max_code), *results))
    codes.copy_(new)
    return moved


def search_grid(weight: Tensor, scheme: WeightScheme, scale_dtype: torch.dtype, importance: Tensor) -> Grid:
    """primitives.search_grid for importance [in]."""
    rows, columns = weight.shape
    size = scheme.columns_per_scale(columns)
    scale, zero = torch.empty(rows, columns // size), torch.empty(rows, columns // size)
    limits = torch.finfo(scale_dtype)
    stored = (_DROPPED[scale_dtype], np.float32(limits.tiny), np.float32(limits.max))
    numbers = (np.float32(scheme.max_code), np.float32(scheme.middle), scheme.symmetric)
    given = (_array(weight), _array(importance), np.array(SHRINK, dtype=np.float32))
    results = (scale.numpy(), zero.numpy())
    _by_rows(rows, lambda part: _search(part.start, part.stop, *given, size, *numbers, *stored, REFINEMENTS, *results))
    return Grid(scale, zero)


def _array(tensor: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = tensor.float().contiguous().numpy()
    return array


def _by_rows(count: int, work: Callable[[slice], None]) -> None:
    """Split rows over as many threads as PyTorch would use; compiled code does not hold the interpreter's lock."""
    threads = max(1, min(torch.get_num_threads(), count // _LEAST_ROWS))
    parts = [slice(count * i // threads, count * (i + 1) // threads) for i in range(threads)]
    begun = [_helpers(threads - 1).submit(work, part) for part in parts[1:]]
    work(parts[0])
    for one in begun:
        one.result()


@functools.cache
def _helpers(threads: int) -> ThreadPoolExecutor:
    """Threads that stay: to start one takes as long as a few columns of a block."""
    return ThreadPoolExecutor(threads, thread_name_prefix="rows")


@compiled(fastmath={"contract"})
def _add(total, values, times):
    for k in range(len(total)):
        total[k] += times * values[k]


@compiled()
def _compensate(first, last, weight, factor, scale, zero, max_code, codes, errors):
    columns = weight.shape[1]
    for row in range(first, last):
        w = weight[row].copy()
        for j in range(columns):
            s, z = scale[row, j], zero[row, j]
            code = min(max(np.rint(w[j] / s + z), np.float32(0)), max_code)
            error = (w[j] - s * (code - z)) / factor[j, j]
            codes[row, j], errors[row, j] = code, error
            _add(w[j + 1 :], factor[j, j + 1 :], -error)


@compiled()
def _descend(first, last, gradient, hessian, scale, zero, max_code, codes, moved):
    columns = gradient.shape[1]
    for row in range(first, last):
        g = gradient[row].copy()
        for j in range(columns):
            s, z, before = scale[row, j], zero[row, j], codes[row, j]
            code = np.rint(((before - z) * s + g[j] / hessian[j, j]) / s + z)
            code = min(max(code, np.float32(0)), max_code)
            codes[row, j] = code
            change = (before - code) * s
            moved[row, j] = change
            if change != 0:  # most codes stay
                _add(g[j + 1 :], hessian[j, j + 1 :], change)


@compiled()
def _as_stored(scale, dropped, tiny, largest):
    """float32 rounded to the nearest of a dtype with fewer mantissa bits, ties to even; subnormals do not occur."""
    magnitude = np.float32(min(max(abs(scale), tiny), largest))
    if dropped:
        bits = magnitude.view(np.int32)
        half = np.int32((1 << (dropped - 1)) - 1)
        bits = np.int32(bits + half + ((bits >> dropped) & 1))
        magnitude = np.int32(bits & ~np.int32((1 << dropped) - 1)).view(np.float32)
    return -magnitude if scale < 0 else magnitude


# sums over a group may be taken in any order
@compiled(fastmath={"reassoc", "contract"})
def _fit(w, c, scale, zero, max_code):
    """(power, match) of the nearest codes' offsets: sums of c o^2 and of c o w."""
    power = match = np.float32(0)
    for j in range(len(w)):
        offset = min(max(np.rint(w[j] / scale + zero), np.float32(0)), max_code) - zero
        weighted = c[j] * offset
        power += weighted * offset
        match += weighted * w[j]
    return power, match


@compiled()
def _search(
    first, last, weight, cost, shrinks, size, max_code, middle, symmetric, dropped, tiny, largest, rounds, scales, zeros
):
    nothing = np.float32(0)
    for row in range(first, last):
        for group in range(scales.shape[1]):
            w = weight[row, group * size : (group + 1) * size]
            c = cost[group * size : (group + 1) * size]
            low, high = min(w.min(), nothing), max(w.max(), nothing)
            best_error, best_scale, best_zero = np.float32(np.inf), np.float32(1), nothing
            for kind in range(2 if symmetric else 1):
                for shrink in shrinks:
                    if symmetric:
                        far = high if high > -low else low
                        scale = far / -middle if kind == 0 else max(high, -low) / (max_code / np.float32(2))
                        scale, zero = np.float32(scale * shrink), middle
                    else:
                        scale = np.float32(max((high - low) * shrink / max_code, np.float32(1e-30)))
                        zero = min(max(np.rint(-low * shrink / scale), nothing), max_code)
                    for _ in range(rounds):
                        scale = _as_stored(scale, dropped, tiny, largest)
                        power, match = _fit(w, c, scale, zero, max_code)
                        error = scale * (scale * power - np.float32(2) * match)
                        if error < best_error:
                            best_error, best_scale, best_zero = error, scale, zero
                        if power > 0:
                            scale = np.float32(match / power)
            scales[row, group], zeros[row, group] = best_scale, best_zero
