"""Compiled loops of second-order rounding beside the PyTorch ones, which test_gguf_second_order.py checks by brute force."""

from __future__ import annotations

from types import ModuleType

import torch

from lowbit.methods.kquants.codec import CODECS
from lowbit.methods.kquants.curvature import Curvature, factor_gram
from lowbit.methods.kquants.grid import Grid
from lowbit.methods.kquants.rows_state import RowsState
from lowbit.methods.kquants.second_order import _round_stretch

KINDS = ["Q2_K", "Q3_K", "Q4_K", "Q6_K", "Q4_0", "Q5_1", "Q8_0"]


def assert_same_compensation(kernels: ModuleType, kind: str, device: str, rows: int = 40) -> None:
    """GPTQ's loop over 96 columns."""
    state, curvature = example(kind, rows)
    order = curvature.factored.order
    scale, minimum = (part[:96] for part in state.column_grid(order))
    rotated, factor = state.target[order][:96], curvature.factored.upper[:96, :96]
    state.kernels = None
    levels, errors = _round_stretch(state, rotated.clone(), scale, minimum, factor)
    given = [tensor.to(device) for tensor in (rotated, factor, scale, minimum)]
    found, left = kernels.compensate(*given, state.codec.levels[0], state.codec.levels[-1])
    assert (found.cpu() == levels).float().mean() > 0.999
    torch.testing.assert_close(left.cpu().abs().sum(), errors.abs().sum(), rtol=1e-3, atol=1e-6)


def assert_same_moves(kernels: ModuleType, kind: str, rows: int = 40) -> None:
    """Moves of four sub-blocks."""
    loop, curvature = example(kind, rows)
    moved, _ = example(kind, rows)
    loop.kernels, moved.kernels = None, kernels
    hessian = curvature.hessian
    gradient = hessian @ (loop.target - loop.dequantize())
    for index in range(4):
        here = slice(index * loop.sub, (index + 1) * loop.sub)
        block = index * loop.sub // loop.block
        square, slope = hessian[here, here], gradient[here]
        expected = loop._move_sub_block(block, index, square, slope)
        change = moved._move_compiled(block, index, square, slope)
        torch.testing.assert_close(change, expected, rtol=1e-4, atol=1e-6)
        assert torch.equal(moved.levels[here], loop.levels[here])
        if loop.scale_codes is not None and moved.scale_codes is not None:
            assert torch.equal(moved.scale_codes[index], loop.scale_codes[index])


def example(kind: str, rows: int, columns: int = 256) -> tuple[RowsState, Curvature]:
    """A matrix with an empty row and empty sub-blocks, on ggml's own grid."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(rows, columns, generator=generator) * 0.05
    weights[3] = 0
    weights[5, :32] = 0
    weights[6, :256] = 0
    mixed = torch.eye(columns) + 0.02 * torch.randn(columns, columns, generator=generator)
    inputs = torch.randn(600, columns, generator=generator) @ mixed
    codec = CODECS[kind]
    grid, codes = codec.choose(weights, None)
    return RowsState(codec, grid, weights.T.contiguous(), codes), factor_gram(inputs.T @ inputs / 600, 0.01)


def on_device(state: RowsState, device: str) -> RowsState:
    """A copy there."""
    grid = state.grid()
    parts = (grid.d, grid.dmin, grid.scale_codes, grid.min_codes)
    moved = Grid(*(None if part is None else part.to(device) for part in parts))  # type: ignore[arg-type]  # d is there
    return RowsState(state.codec, moved, state.target.to(device), state.codes().to(device))
