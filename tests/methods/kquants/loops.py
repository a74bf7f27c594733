"""Compiled loops of second-order rounding beside the PyTorch ones, which test_gguf_second_order.py checks by brute force."""

from __future__ import annotations

from types import ModuleType

import torch

from lowbit.methods.kquants.codec import CODECS
from lowbit.methods.kquants.curvature import factor_gram
from lowbit.methods.kquants.rows_state import RowsState
from lowbit.methods.kquants.second_order import _round_stretch

KINDS = ["Q2_K", "Q3_K", "Q4_K", "Q6_K", "Q4_0", "Q5_1", "Q8_0"]


def assert_same_as_loops(kernels: ModuleType, kind: str, device: str, rows: int = 40) -> None:
    """Column compensation and moves of four sub-blocks, of matrices with empty rows and sub-blocks among them."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(rows, 256, generator=generator) * 0.05
    weights[3] = 0
    weights[5, :32] = 0
    mixed = torch.eye(256) + 0.02 * torch.randn(256, 256, generator=generator)
    inputs = torch.randn(600, 256, generator=generator) @ mixed
    codec = CODECS[kind]
    grid, codes = codec.choose(weights, None)
    curvature = factor_gram(inputs.T @ inputs / 600, 0.01)
    target = weights.T.contiguous()

    # the loop's own PyTorch code runs on the CPU; the kernel gets the same numbers on its device
    loop = RowsState(codec, grid, target, codes)
    scale, minimum = (part[:96] for part in loop.column_grid(curvature.factored.order))
    rotated, factor = target[curvature.factored.order][:96], curvature.factored.upper[:96, :96]
    loop.kernels = None
    levels, errors = _round_stretch(loop, rotated.clone(), scale, minimum, factor)
    given = [tensor.to(device) for tensor in (rotated, factor, scale, minimum)]
    found, left = kernels.compensate(*given, codec.levels[0], codec.levels[-1])
    assert (found.cpu() == levels).float().mean() > 0.999
    torch.testing.assert_close(left.cpu().abs().sum(), errors.abs().sum(), rtol=1e-3, atol=1e-6)

    hessian = curvature.hessian
    gradient = hessian @ (loop.target - loop.dequantize())
    moved = _moved_to(RowsState(codec, grid, target, codes), device)
    moved.kernels = kernels
    for index in range(4):
        here = slice(index * loop.sub, (index + 1) * loop.sub)
        block = index * loop.sub // loop.block
        square, slope = hessian[here, here], gradient[here]
        expected = loop._move_sub_block(block, index, square, slope)
        change = moved._move_compiled(block, index, square.to(device), slope.to(device))
        torch.testing.assert_close(change.cpu(), expected, rtol=1e-4, atol=1e-6)
        assert torch.equal(moved.levels[here].cpu(), loop.levels[here])
        if loop.scale_codes is not None and moved.scale_codes is not None:
            assert torch.equal(moved.scale_codes[index].cpu(), loop.scale_codes[index])


def _moved_to(state: RowsState, device: str) -> RowsState:
    for name, value in vars(state).items():
        if isinstance(value, torch.Tensor):
            setattr(state, name, value.to(device))
    return state
