"""GPTQ against a slow literal implementation of the paper, and its refinements against brute force."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.core.codebooks import codebook, group_scale
from lowbit.core.errors import CalibrationError
from lowbit.core.primitives import Grid, group_of_columns, min_max_grid, search_grid, to_codes
from lowbit.core.scheme import WeightScheme
from lowbit.core.statistics import InputStatistics
from lowbit.methods import fp4
from lowbit.methods.columns import compensate
from lowbit.methods.gptq import GptqOptions, quantize, round_columns
from lowbit.methods.hessian import factor
from lowbit.methods.refine import descend_codes, fit_scales, scale_systems
from tests.methods.errors import output_error

CPU = torch.device("cpu")


def layer(rows: int = 24, columns: int = 64, tokens: int = 512, seed: int = 0) -> tuple[torch.Tensor, InputStatistics]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    inputs = torch.randn(tokens, columns, generator=generator) @ mixing * torch.rand(columns, generator=generator) * 3
    statistics = InputStatistics(columns, CPU)
    statistics.add(inputs)
    statistics.finish()
    return weight, statistics


Nearest = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]


def literal_gptq(weight: torch.Tensor, hessian: torch.Tensor, nearest: Nearest) -> torch.Tensor:
    """The paper's derivation without Cholesky and without blocks: after each column the inverse Hessian of the remaining
    columns is computed afresh (equations 2 and 3, optimal brain surgeon), in float64.

    nearest: of a column and its number -> what is kept of it, and the weights which that stands for."""
    weight, kept = weight.double().clone(), torch.empty_like(weight)
    columns = weight.shape[1]
    for j in range(columns):
        inverse = torch.linalg.inv(hessian.double()[j:, j:])
        own, rounded = nearest(weight[:, j], j)
        kept[:, j] = own.float()
        error = (weight[:, j] - rounded) / inverse[0, 0]
        weight[:, j:] -= error[:, None] * inverse[0][None, :]
    return kept


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [8, 64, 128])
def test_column_loop_equals_the_paper(bits: int, symmetric: bool, block: int) -> None:
    weight, statistics = layer()
    scheme = WeightScheme(bits=bits, group_size=16, symmetric=symmetric)
    damp = 0.01 * statistics.gram.diagonal().mean().item()
    upper = factor(statistics.gram, torch.arange(64), damp).upper
    grid = min_max_grid(weight, scheme, torch.float32)
    groups = group_of_columns(64, scheme, CPU)

    def within(part: torch.Tensor, inverse: torch.Tensor, here: slice) -> tuple[torch.Tensor, torch.Tensor]:
        return compensate(part, inverse, grid, groups[here], scheme.max_code)

    ours = round_columns(weight.clone(), upper, within, block=block)
    damped = statistics.gram + damp * torch.eye(64)

    def nearest(column: torch.Tensor, j: int) -> tuple[torch.Tensor, torch.Tensor]:
        scale, zero = grid.scale[:, groups[j]].double(), grid.zero[:, groups[j]].double()
        code = torch.round(column / scale + zero).clamp(0, scheme.max_code)
        return code, scale * (code - zero)

    literal = literal_gptq(weight, damped, nearest)
    # a code may fall the other way where float32 and float64 land on different sides of a rounding border
    assert (ours != literal).float().mean() < 0.005


@pytest.mark.parametrize(("kind", "group"), [("mxfp4", 32), ("nvfp4", 16)])
@pytest.mark.parametrize("act_order", ["static", "none"])
def test_small_floats_equal_the_paper_too(kind: Any, group: int, act_order: Any) -> None:
    weight, statistics = layer()
    scheme = WeightScheme(kind=kind, bits=4, group_size=group)
    hessian = statistics.gram.clone()
    options = GptqOptions(percdamp=0.01, act_order=act_order, asymmetric=0)
    tensor = quantize(weight, statistics, scheme, options).tensor
    by_power = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    order = by_power if act_order == "static" else torch.arange(64)
    scales = group_scale(kind, tensor.scale, tensor.extra).repeat_interleave(group, 1)[:, order].double()
    levels = codebook(kind).double()

    def nearest(column: torch.Tensor, j: int) -> tuple[torch.Tensor, torch.Tensor]:
        value = levels[(column[:, None] / scales[:, j : j + 1] - levels).abs().argmin(1)]
        return value, value * scales[:, j]

    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(64)
    literal = literal_gptq(weight[:, order], damped[order][:, order], nearest)
    ours = codebook(kind)[tensor.codes.int()][:, order]
    assert (ours != literal).float().mean() < 0.005
    # scales are chosen by the same rule of other costs, so only what the columns make up for is left to lower the error
    rounded = fp4.quantize(weight, None, scheme, fp4.Fp4Options()).tensor
    errors = [output_error(weight, one.dequantize(), hessian).sum() for one in (tensor, rounded)]
    assert errors[0] < 0.7 * errors[1]


@pytest.mark.parametrize("act_order", ["static", "desc", "none"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_beats_rounding_to_nearest(act_order: str, symmetric: bool) -> None:
    weight, statistics = layer()
    scheme = WeightScheme(bits=3, group_size=16, symmetric=symmetric, reordered=act_order == "desc")
    result = quantize(weight, statistics, scheme, GptqOptions(act_order=act_order), torch.float32)  # type: ignore[arg-type]
    plain = min_max_grid(weight, scheme, torch.float32)
    groups = group_of_columns(64, scheme, CPU)
    nearest = (
        to_codes(weight, plain.scale[:, groups], plain.zero[:, groups], 7) - plain.zero[:, groups]
    ) * plain.scale[:, groups]
    ours = output_error(weight, result.tensor.dequantize(), statistics.gram).sum()
    assert ours < 0.6 * output_error(weight, nearest, statistics.gram).sum()


def test_static_order_keeps_groups_and_desc_moves_them() -> None:
    weight, statistics = layer()
    static = quantize(weight, statistics, WeightScheme(group_size=16), GptqOptions(), torch.float16).tensor
    assert static.group_index is None
    moved = quantize(
        weight, statistics, WeightScheme(group_size=16, reordered=True), GptqOptions(act_order="desc"), torch.float16
    ).tensor
    assert moved.group_index is not None
    strongest = statistics.gram.diagonal().argsort(descending=True)[:16]
    assert moved.group_index[strongest].eq(0).all()
    assert moved.group_index.bincount().eq(16).all()


def test_each_refinement_lowers_the_error_it_minimizes() -> None:
    weight, statistics = layer()
    scheme = WeightScheme(bits=3, group_size=16)
    groups = group_of_columns(64, scheme, CPU)
    grid = min_max_grid(weight, scheme, torch.float32)
    codes = to_codes(weight, grid.scale[:, groups], grid.zero[:, groups], 7)

    def error(codes: torch.Tensor, grid: Grid) -> torch.Tensor:
        return output_error(weight, (codes - grid.zero[:, groups]) * grid.scale[:, groups], statistics.gram)

    fitted = Grid(fit_scales(weight, codes, grid, groups, statistics.gram, torch.float32), grid.zero)
    assert (error(codes, fitted) <= error(codes, grid)).all()
    descended = descend_codes(weight, codes, fitted, groups, statistics.gram, 7)
    assert (error(descended, fitted) <= error(codes, fitted) * (1 + 1e-5)).all()
    assert error(descended, fitted).sum() < 0.8 * error(codes, grid).sum()


def test_fitted_scales_are_the_least_squares_solution() -> None:
    weight, statistics = layer(rows=5)
    scheme = WeightScheme(bits=4, group_size=16)
    groups = group_of_columns(64, scheme, CPU)
    grid = min_max_grid(weight, scheme, torch.float32)
    codes = to_codes(weight, grid.scale[:, groups], grid.zero[:, groups], 15)
    fitted = fit_scales(weight, codes, grid, groups, statistics.gram, torch.float32)
    root = torch.linalg.cholesky(statistics.gram.double()).T  # |R x|^2 = x H x
    for row in range(5):
        design = torch.zeros(64, 4, dtype=torch.float64)
        design[torch.arange(64), groups] = (codes[row] - 8).double()
        expected = torch.linalg.lstsq(root @ design, root @ weight[row].double()).solution
        torch.testing.assert_close(fitted[row].double(), expected, rtol=1e-3, atol=1e-5)


def test_descent_ends_where_no_single_code_can_improve() -> None:
    weight, statistics = layer(rows=3, columns=8)
    scheme = WeightScheme(bits=2, group_size=8)
    groups = group_of_columns(8, scheme, CPU)
    grid = min_max_grid(weight, scheme, torch.float32)
    codes = to_codes(weight, grid.scale[:, groups], grid.zero[:, groups], 3)
    for _ in range(10):
        codes = descend_codes(weight, codes, grid, groups, statistics.gram, 3, block=3)

    def error(trial: torch.Tensor) -> torch.Tensor:
        return output_error(weight, (trial - grid.zero[:, groups]) * grid.scale[:, groups], statistics.gram)

    for column, code in itertools.product(range(8), range(4)):
        trial = codes.clone()
        trial[:, column] = code
        assert (error(trial) >= error(codes) * (1 - 1e-5)).all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), bits=st.sampled_from([2, 3, 4]), symmetric=st.booleans())
def test_searched_grid_is_never_worse_than_min_max(seed: int, bits: int, symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 32, generator=generator) ** 3
    importance = torch.rand(32, generator=generator) + 0.01
    scheme = WeightScheme(bits=bits, group_size=16, symmetric=symmetric)
    groups = group_of_columns(32, scheme, CPU)

    def cost(grid: Grid) -> torch.Tensor:
        scale, zero = grid.scale[:, groups], grid.zero[:, groups]
        error = weight - scale * (to_codes(weight, scale, zero, scheme.max_code) - zero)
        return (importance * error.square()).sum()

    assert (
        cost(search_grid(weight, scheme, torch.float16, importance))
        <= cost(min_max_grid(weight, scheme, torch.float16)) * 1.001
    )


def test_hessian_that_is_not_positive_definite_is_damped_and_reported() -> None:
    weight, statistics = layer(tokens=512)
    statistics.gram[0, 1] = statistics.gram[1, 0] = 1.3 * statistics.gram.diagonal()[:2].max()
    result = quantize(weight, statistics, WeightScheme(group_size=16), GptqOptions(), torch.float16)
    assert "not positive definite" in result.notes[0]
    assert torch.isfinite(result.tensor.dequantize()).all()


def test_rows_in_parts_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, statistics = layer()
    whole = quantize(weight, statistics, WeightScheme(bits=3, group_size=16), GptqOptions(), torch.float16).tensor
    monkeypatch.setattr("lowbit.methods.gptq._WEIGHTS_AT_ONCE", 5 * 64)
    parts = quantize(weight, statistics, WeightScheme(bits=3, group_size=16), GptqOptions(), torch.float16).tensor
    assert (whole.codes != parts.codes).float().mean() < 0.01
    torch.testing.assert_close(whole.scale, parts.scale, rtol=0.02, atol=1e-4)


def test_hopeless_hessian_is_an_error() -> None:
    weight, statistics = layer()
    statistics.gram.fill_(float("nan"))
    with pytest.raises(CalibrationError, match="could not be factored"):
        quantize(weight, statistics, WeightScheme(group_size=16), GptqOptions(), torch.float16)


def test_channels_never_seen_round_to_nearest() -> None:
    weight, statistics = layer()
    statistics.gram[:, 5] = statistics.gram[5] = 0
    result = quantize(weight, statistics, WeightScheme(bits=8, group_size=16), GptqOptions(), torch.float16)
    torch.testing.assert_close(result.tensor.dequantize()[:, 5], weight[:, 5], atol=0.03, rtol=0.05)


def test_asymmetric_target_is_the_best_linear_map() -> None:
    """With arriving inputs X and original inputs X0, 8-bit weights land next to argmin |W X0 - Q X|."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(8, 16, generator=generator)
    original = torch.randn(4096, 16, generator=generator)
    arriving = original + 0.3 * torch.randn(4096, 16, generator=generator) + 0.1 * original.roll(1, 1)
    statistics = InputStatistics(16, CPU, cross=True)
    statistics.add(arriving, original)
    statistics.finish()
    options = GptqOptions(percdamp=1e-6, asymmetric=1.0)
    result = quantize(weight, statistics, WeightScheme(bits=8, group_size=16), options, torch.float32)
    best = torch.linalg.lstsq(arriving.double(), original.double() @ weight.double().T).solution.T
    torch.testing.assert_close(result.tensor.dequantize(), best.float(), atol=0.03, rtol=0.03)
    assert (weight - best.float()).abs().max() > 0.1


def test_scale_systems_are_the_products_of_offsets_by_group() -> None:
    generator = torch.Generator().manual_seed(0)
    offsets, inputs = torch.randint(-8, 8, (7, 80), generator=generator), torch.randn(300, 80, generator=generator)
    hessian = inputs.T @ inputs / len(inputs)
    design = torch.zeros(7, 80, 5, dtype=torch.float64)  # A: a row's offsets, each in its group's column
    for group in range(5):
        design[:, group * 16 : (group + 1) * 16, group] = offsets[:, group * 16 : (group + 1) * 16]
    expected = design.mT @ hessian.double() @ design
    torch.testing.assert_close(scale_systems(offsets.float(), hessian, 5).double(), expected, rtol=1e-4, atol=1e-4)
