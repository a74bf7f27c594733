"""Learned rounding: matrices in training against a literal dequantization, and training itself on a layer of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lowbit.core.qtensor import QTensor
from lowbit.core.scheme import WeightScheme
from lowbit.methods.kquants import CODECS, decode
from lowbit.methods.learned_blocks import BlockMatrix, LearnedBlocks
from lowbit.methods.learned_levels import Levels
from lowbit.methods.learned_matrix import LearnedMatrix
from lowbit.methods.learning import Learned, LearnOptions, learn

TYPES = list(CODECS)
ROWS, COLUMNS = 6, 512


def weights(seed: int = 0) -> Tensor:
    made = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed)) * 0.05 + 0.01
    made[1, 256:] = 0  # a whole super-block
    made[2, 32:64] = 0
    return made


def matrix(kind: str, weight: Tensor) -> BlockMatrix:
    return BlockMatrix(CODECS[kind], *CODECS[kind].choose(weight, None))


def moved(kind: str, position: float = 0.7, stretch: float = 0.1) -> LearnedBlocks:
    """A matrix somewhere in training."""
    generator = torch.Generator().manual_seed(1)
    one = LearnedBlocks(weights(), matrix(kind, weights()))
    with torch.no_grad():
        free = ~one.fixed.expand(one.position.view(one.shape).shape).reshape(one.position.shape)
        one.position += position * free * torch.empty_like(one.position).uniform_(-1, 1, generator=generator)
        for part in one.stretches:
            part += stretch * torch.empty_like(part).uniform_(-1, 1, generator=generator)
    return one


@pytest.mark.parametrize("kind", TYPES)
def test_training_starts_exactly_from_what_the_file_would_hold(kind: str) -> None:
    start = matrix(kind, weights())
    # codes that are not the nearest, as second-order rounding leaves them
    other = torch.randint(0, len(CODECS[kind].levels), start.codes.shape, generator=torch.Generator().manual_seed(2))
    mixed = torch.where(torch.rand(other.shape, generator=torch.Generator().manual_seed(3)) < 0.3, other, start.codes)
    for begin in (start, replace(start, codes=mixed.byte())):
        one = LearnedBlocks(weights(), begin)
        assert torch.equal(one.weight(), begin.dequantize())
        assert torch.equal(one.result().dequantize(), begin.dequantize())
        assert torch.equal(decode(kind, one.result().pack(), COLUMNS), begin.dequantize())


@pytest.mark.parametrize("kind", TYPES)
def test_what_was_trained_is_what_the_file_holds(kind: str) -> None:
    one = moved(kind)
    result = one.result()
    assert torch.equal(decode(kind, result.pack(), COLUMNS), one.weight())
    start = one.start
    assert not torch.equal(result.codes, start.codes)
    if kind != "MXFP4":
        assert result.grid.d.dtype == torch.float16
        assert not torch.equal(result.grid.d, start.grid.d)
    for name in ("scale_codes", "min_codes"):
        before, after = getattr(start.grid, name), getattr(result.grid, name)
        assert before is after or torch.equal(before, after)


@pytest.mark.parametrize("kind", TYPES)
def test_zeros_stay_zeros(kind: str) -> None:
    one = moved(kind, position=0.0)
    start = matrix(kind, weights())
    empty = start.dequantize()[1, 256:]
    if bool((empty == 0).all()):  # Q4_0 and the like have no other way to store zeros
        gradient = torch.autograd.grad(one.weight().square().sum() + one.weight().sum(), one.position)[0]
        assert not gradient[1, 256:].any()
        assert not one.result().dequantize()[1, 256:].any()
        assert torch.equal(one.result().codes[1, 256:], start.codes[1, 256:]) or kind == "MXFP4"


@pytest.mark.parametrize("kind", TYPES)
def test_weights_begin_next_to_the_original_within_their_codes_cell(kind: str) -> None:
    """Moved by half a step or less towards the original, a code changes only if that brings it nearer or as near."""
    weight, start = weights(), matrix(kind, weights())
    one = LearnedBlocks(weight, start)
    levels = one.levels.values
    own = torch.searchsorted(levels, torch.tensor(CODECS[kind].levels).float()[start.codes.int()])
    distance = one.position.detach() - own
    assert distance.abs().max() <= 0.4991
    free = ~one.fixed.expand(one.position.view(one.shape).shape).reshape(weight.shape)
    error = (weight - start.dequantize()) * torch.where(_scale(start) < 0, -1, 1)
    # on the side of the original weight, or on the spot
    assert bool((distance * error >= -1e-6)[free].all())


def _scale(start: BlockMatrix) -> Tensor:
    scale, _ = start.codec.scale_min(start.grid)
    return scale.repeat_interleave(COLUMNS // scale.shape[1], 1)


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_1", "Q8_0", "IQ4_XS", "MXFP4"])
def test_gradients_are_those_of_straight_through_rounding(kind: str) -> None:
    """One weight at a time, in plain Python: rounding counts as the identity, clamping as what it is, minimums by hand."""
    one = moved(kind, position=0.45)
    coefficients = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(4))
    found = torch.autograd.grad((one.weight() * coefficients).sum(), [one.position, *one.stretches])
    grid, levels = one.start.grid, sorted(set(CODECS[kind].levels))
    per_d, per_sub = COLUMNS // grid.d.shape[1], COLUMNS // one.shape[1]
    expected = [torch.zeros(ROWS, COLUMNS), *(torch.zeros_like(part) for part in one.stretches)]
    for row in range(3):
        for column in range(COLUMNS):
            block, sub = column // per_d, column // per_sub
            stretch = one.stretches[0][row, block].item() if one.stretches else 1.0
            code = 1 if grid.scale_codes is None else grid.scale_codes[row, sub].item()
            d = grid.d[row, block].item()
            c = coefficients[row, column].item()
            position = one.position[row, column].item()
            below = min(max(int(position // 1), 0), len(levels) - 2)
            gap = levels[below + 1] - levels[below]
            value = (levels[below] + (position - below) * gap) / stretch
            level = min(levels, key=lambda each: abs(each - value))
            inside = levels[0] <= value <= levels[-1]
            if not one.fixed[row, sub, 0]:
                expected[0][row, column] = c * d * code * gap * inside
            if one.stretches:
                # (level + (value / s - its own number)) * s * d * code
                expected[1][row, block] += c * d * code * (level - value * inside * (not one.fixed[row, sub, 0]))
                if one.fixed[row, sub, 0]:
                    expected[1][row, block] -= c * d * code * value * inside
            if grid.dmin is not None:
                min_code = 1 if grid.min_codes is None else grid.min_codes[row, sub].item()
                expected[2][row, block] -= c * grid.dmin[row, block].item() * min_code
    for mine, theirs in zip(expected, found, strict=True):
        torch.testing.assert_close(mine[:3], theirs[:3], rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("values", [[-4.0, -3.0, -2.0, -1.0, 0.0], [-127.0, -104.0, 1.0, 13.0, 25.0]])
def test_positions_and_values_are_each_others_inverse(values: list[float]) -> None:
    levels = Levels(torch.tensor(values))
    assert levels.even == (values[0] == -4)
    position = torch.linspace(-0.4, 4.4, 50)
    torch.testing.assert_close(levels.position(levels.value(position)), position, atol=1e-5, rtol=1e-5)
    assert torch.equal(levels.rank(levels.values), torch.arange(5))
    between = torch.linspace(values[0] - 3, values[-1] + 3, 101)
    nearest = torch.tensor([min(values, key=lambda level: abs(level - each)) for each in between.tolist()])
    assert (levels.rounded(between) == nearest).float().mean() > 0.97  # a tie may go either way


def test_rows_are_moved_with_all_that_belongs_to_them() -> None:
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))
    for kind in ("Q4_K", "Q3_K", "Q4_0", "Q5_1"):
        one = matrix(kind, weights())
        assert torch.equal(one.rows(order).dequantize(), one.dequantize()[order])
        assert torch.equal(one.rows(order).pack(), one.pack()[order])


def trained(
    one: LearnedBlocks | LearnedMatrix, weight: Tensor, options: LearnOptions
) -> Learned[BlockMatrix | QTensor]:
    """A "block" of one layer whose output is added to what comes in, on correlated inputs."""
    generator = torch.Generator().manual_seed(5)
    columns = weight.shape[1]
    mix = torch.randn(columns // 8, columns, generator=generator) / columns**0.5
    inputs = torch.randn(16, 64, columns // 8, generator=generator) @ mix
    out = torch.randn(len(weight), columns, generator=generator)

    def run(given: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        return hidden + hidden @ given["layer"].T @ out

    target = run({"layer": weight}, inputs)
    return learn({"layer": one}, run, lambda at: inputs[at], lambda at: target[at], len(inputs), options)


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q4_0", "Q5_1", "IQ4_XS", "MXFP4"])
def test_training_lowers_the_loss_on_windows_it_has_not_seen(kind: str) -> None:
    weight = weights()
    options = LearnOptions(steps=40, batch=4, reach=1.0)
    found = trained(LearnedBlocks(weight, matrix(kind, weight)), weight, options)
    assert not found.kept_start
    assert found.after < 0.9 * found.before
    again = trained(LearnedBlocks(weight, matrix(kind, weight)), weight, options)
    assert torch.equal(found.tensors["layer"].dequantize(), again.tensors["layer"].dequantize())


def test_a_start_that_cannot_be_improved_is_kept() -> None:
    start = matrix("Q4_K", weights())
    found = trained(LearnedBlocks(start.dequantize(), start), start.dequantize(), LearnOptions(steps=5, reach=2.0))
    assert found.kept_start
    assert found.tensors["layer"] is start


@pytest.mark.parametrize(
    ("kind", "code"), [("int", torch.uint8), ("float", torch.float8_e4m3fn), ("mxfp4", torch.uint8)]
)
def test_other_grids_start_exactly_too(kind: str, code: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(6)
    codes = torch.randint(0, 16, (4, 64), generator=generator).byte()
    scale = torch.rand(4, 2, generator=generator) + 0.5
    scheme = WeightScheme(kind=kind, bits=8 if kind == "float" else 4, group_size=32)
    if kind == "float":
        codes = torch.randn(4, 64, generator=generator).to(code)
    if kind == "mxfp4":
        scale = torch.randint(126, 128, (4, 2), generator=generator).byte()
    start = QTensor(codes, scale.half() if scale.is_floating_point() else scale, scheme)
    step = start.dequantize().abs().mean() / 4
    weight = start.dequantize() + step * torch.empty(4, 64).uniform_(-1, 1, generator=generator)
    one = LearnedMatrix(weight, start)
    assert torch.equal(one.weight(), start.dequantize())
    assert torch.equal(one.result().dequantize(), start.dequantize())
    found = trained(LearnedMatrix(weight, start), weight, LearnOptions(steps=40, batch=4, reach=1.0))
    assert found.after < 0.95 * found.before
