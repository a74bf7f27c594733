"""Codes in training: the same weights as the formats' own dequantization, and a gradient that is plain to derive."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lowbit.core.qtensor import QTensor
from lowbit.core.scheme import WeightScheme
from lowbit.methods.even_grid import EvenGrid, MovingCodes
from lowbit.methods.kquants import CODECS
from lowbit.methods.learned_blocks import BlockMatrix

UNIFORM = [name for name, codec in CODECS.items() if codec.uniform]


def weights(rows: int = 24, columns: int = 512) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02 + 0.003


def integers(bits: int, *, symmetric: bool, group: int, shuffled: bool = False) -> tuple[Tensor, QTensor]:
    """A weight and its rounding to nearest, by the definition."""
    weight, top = weights(), 2**bits - 1
    rows, columns = weight.shape
    size = group or columns
    index = torch.arange(columns) // size
    if shuffled:
        index = index[torch.randperm(columns, generator=torch.Generator().manual_seed(1))]
    scale = torch.full((rows, columns // size), 0.15 / top)
    zero = torch.full_like(scale, 2 ** (bits - 1) if symmetric else 3.0)
    codes = (weight / scale[:, index] + zero[:, index]).round().clamp(0, top).to(torch.uint8)
    scheme = WeightScheme(
        kind="int", bits=bits, group_size=group, symmetric=symmetric, granularity="group" if group else "channel"
    )
    stored_zero = None if symmetric else zero.to(torch.uint8)
    return weight, QTensor(codes, scale, scheme, stored_zero, index.int() if shuffled else None)


@pytest.mark.parametrize(
    "case", [(4, True, 64, False), (3, False, 32, False), (8, True, 0, False), (4, False, 64, True)]
)
def test_weights_are_those_of_the_integers(case: tuple[int, bool, int, bool]) -> None:
    bits, symmetric, group, shuffled = case
    weight, tensor = integers(bits, symmetric=symmetric, group=group, shuffled=shuffled)
    moving = MovingCodes([weight], [EvenGrid.of_tensor(tensor)])
    assert torch.allclose(moving.weight(), tensor.dequantize(), atol=1e-7)
    assert torch.equal(moving.codes(), tensor.codes)
    inside = (tensor.codes > 0) & (tensor.codes < 2**bits - 1)
    assert torch.allclose((moving.position - tensor.codes)[inside].abs().max(), torch.tensor(0.49), atol=0.01)


@pytest.mark.parametrize("name", UNIFORM)
def test_weights_are_those_of_the_type(name: str) -> None:
    codec, weight = CODECS[name], weights()
    matrix = BlockMatrix(codec, *codec.choose(weight, None))
    moving = MovingCodes([weight], [EvenGrid.of_blocks(matrix)])
    assert torch.allclose(moving.weight(), matrix.dequantize(), atol=1e-6)
    assert torch.equal(moving.codes(), matrix.codes)
    with torch.no_grad():  # a step up wherever there is one
        moving.position.add_(1)
    higher = replace(matrix, codes=moving.codes())
    assert torch.allclose(moving.weight(), higher.dequantize(), atol=1e-6)
    assert not torch.equal(higher.codes, matrix.codes)


def test_gradient_is_a_step_of_the_grid_and_none_beyond_its_ends() -> None:
    weight, tensor = integers(3, symmetric=False, group=32)
    moving = MovingCodes([weight], [EvenGrid.of_tensor(tensor)])
    with torch.no_grad():
        moving.position[0, :3] = torch.tensor([-0.2, 3.3, 7.4])
    along = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    (found,) = torch.autograd.grad(moving.weight(), moving.position, along)
    outside = (moving.position < 0) | (moving.position > 7)
    expected = torch.where(outside, 0.0, along * tensor.scale[:, tensor.column_groups()])
    torch.testing.assert_close(found, expected)
    assert outside[0, :3].tolist() == [True, False, True]


def test_layers_of_one_kind_are_one_matrix() -> None:
    weight, tensor = integers(4, symmetric=True, group=64)
    grid = EvenGrid.of_tensor(tensor)
    both = MovingCodes(
        [weight, weight.flip(0)], [grid, replace(grid, codes=grid.codes.flip(0), scale=grid.scale.flip(0))]
    )
    alone = MovingCodes([weight], [grid]).weight()
    assert torch.equal(both.weight(), torch.cat([alone, alone.flip(0)]))
    assert grid.kind != EvenGrid.of_tensor(integers(3, symmetric=True, group=64)[1]).kind


def test_groups_of_zeros_stay_zeros() -> None:
    weight, codec = weights(), CODECS["Q4_K"]
    weight[3, 256:] = 0
    matrix = BlockMatrix(codec, *codec.choose(weight, None))
    moving = MovingCodes([weight], [EvenGrid.of_blocks(matrix)])
    (gradient,) = torch.autograd.grad(moving.weight().sum(), moving.position)
    assert torch.equal(gradient[3, 256:], torch.zeros(256))
    assert (gradient[2] != 0).float().mean() > 0.9  # all but what lies beyond the grid's ends
    assert torch.equal(moving.codes()[3], matrix.codes[3])
