"""Second-order rounding against a literal column loop, and its promise: no row worse than where it started."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowbit.core.errors import CalibrationError
from lowbit.methods.kquants import CODECS, decode, encode
from lowbit.methods.kquants.curvature import Curvature, factor_gram
from lowbit.methods.kquants.rows_state import RowsState
from lowbit.methods.kquants.second_order import SecondOrderOptions, quantize, split
from tests.methods.errors import output_error

TYPES = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "IQ4_XS", "MXFP4"]
ROWS, COLUMNS = 24, 512


def inputs(columns: int = COLUMNS, tokens: int = 2048) -> Tensor:
    """Correlated, with a few channels far stronger than others, as in language models."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return x / columns**0.5 * torch.logspace(-1, 1, columns)[torch.randperm(columns, generator=generator)]


def weights(columns: int = COLUMNS) -> Tensor:
    return torch.randn(ROWS, columns, generator=torch.Generator().manual_seed(1)) * 0.05


@pytest.fixture(scope="module")
def gram() -> Tensor:
    x = inputs()
    return x.T @ x / len(x)


def rounded(type_name: str, weight: Tensor, curvature: Curvature, sweeps: int) -> Tensor:
    grid, codes = quantize(type_name, weight, curvature, SecondOrderOptions(sweeps=sweeps))
    packed = CODECS[type_name].pack(grid, codes)
    return decode(type_name, packed, weight.shape[1])  # through the file's own bytes


@pytest.mark.parametrize("type_name", TYPES)
def test_no_row_is_worse_than_nearest_rounding_and_most_are_far_better(type_name: str, gram: Tensor) -> None:
    weight, curvature = weights(), factor_gram(gram)
    plain = output_error(weight, decode(type_name, encode(type_name, weight), COLUMNS), curvature.hessian)
    important = encode(type_name, weight, curvature.factored.cost)
    start = output_error(weight, decode(type_name, important, COLUMNS), curvature.hessian)
    ours = output_error(weight, rounded(type_name, weight, curvature, 3), curvature.hessian)
    assert bool((ours <= start * 1.0001).all())
    assert ours.sum() < 0.7 * min(plain.sum(), start.sum())


@pytest.mark.parametrize("type_name", ["Q3_K", "Q4_K", "Q6_K", "IQ4_XS", "Q4_1"])
def test_each_sweep_lowers_the_error_of_every_row(type_name: str, gram: Tensor) -> None:
    weight, curvature = weights(), factor_gram(gram)
    before = output_error(weight, rounded(type_name, weight, curvature, 0), curvature.hessian)
    for sweeps in (1, 2):
        after = output_error(weight, rounded(type_name, weight, curvature, sweeps), curvature.hessian)
        assert bool((after <= before * 1.0001).all())
        assert after.sum() < before.sum()
        before = after


@pytest.mark.parametrize("type_name", ["Q3_K", "Q4_K", "Q5_0"])
def test_the_column_loop_is_the_papers(type_name: str, gram: Tensor) -> None:
    """Algorithm 1 of the GPTQ paper with the inverse Hessian updated by elimination, one column at a time, float64."""
    weight, curvature = weights(), factor_gram(gram)
    codec = CODECS[type_name]
    grid, nearest = codec.choose(weight, curvature.factored.cost)
    scale, minimum = (part.double() for part in codec.scale_min(grid))
    sub = COLUMNS // scale.shape[1]
    w, inverse = weight.double(), torch.linalg.inv(curvature.hessian.double())
    q = torch.zeros_like(w)
    for j in curvature.factored.order.tolist():
        s, m = scale[:, j // sub], minimum[:, j // sub]
        level = ((w[:, j] + m) / s).round().clamp(codec.levels[0], codec.levels[-1])
        q[:, j] = torch.where(s == 0, -m, s * level - m)
        w = w - ((w[:, j] - q[:, j]) / inverse[j, j])[:, None] * inverse[j]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    start = codec.dequantize(grid, nearest)
    mine = rounded(type_name, weight, curvature, 0)
    expected = output_error(weight, q.float(), curvature.hessian)
    best = torch.minimum(expected, output_error(weight, start, curvature.hessian))
    # a value between two codes may fall to either side in 32 bits, so rows are compared by what they achieve
    torch.testing.assert_close(output_error(weight, mine, curvature.hessian), best, rtol=0.05, atol=0)
    assert (mine == q.float()).float().mean() > 0.97


def test_zero_rows_and_zero_sub_blocks_stay_exactly_zero(gram: Tensor) -> None:
    weight, curvature = weights(), factor_gram(gram)
    weight[3] = 0
    weight[:, 64:256] = 0
    for type_name in ("Q3_K", "Q4_K", "Q6_K"):
        q = rounded(type_name, weight, curvature, 3)
        assert not q[3].any()
        assert not q[:, 64:256].any()


def test_channels_without_input_are_rounded_to_nearest() -> None:
    x = inputs()
    x[:, 256:] = 0
    curvature = factor_gram(x.T @ x / len(x))
    weight = weights()
    q = rounded("Q8_0", weight, curvature, 2)
    torch.testing.assert_close(q[:, 256:], weight[:, 256:], atol=0.003, rtol=0)


def test_cost_is_what_an_error_in_a_column_costs(gram: Tensor) -> None:
    curvature = factor_gram(gram)
    # the last column in order has none after it that could make up; the first has all
    last, first = int(curvature.factored.order[-1]), int(curvature.factored.order[0])
    assert curvature.factored.cost[last] == pytest.approx(curvature.hessian[last, last].item(), rel=1)
    inverse = torch.linalg.inv(curvature.hessian.double())
    assert curvature.factored.cost[first].item() == pytest.approx((1 / inverse[first, first]).item(), rel=1e-2)
    assert bool((curvature.factored.cost <= curvature.hessian.diagonal() * 1.001).all())


def test_the_gram_matrix_is_left_as_it_was(gram: Tensor) -> None:
    before = gram.clone()
    factor_gram(gram)
    assert torch.equal(gram, before)


def test_a_hessian_that_cannot_be_factored_is_refused() -> None:
    with pytest.raises(CalibrationError):
        factor_gram(torch.full((32, 32), torch.nan))


@pytest.mark.parametrize("type_name", ["Q4_K", "Q6_K", "Q5_1"])
def test_matrices_rounded_as_one_are_what_they_are_alone(type_name: str, gram: Tensor) -> None:
    weight, curvature, options = weights(), factor_gram(gram), SecondOrderOptions(sweeps=1)
    parts = split(*quantize(type_name, weight, curvature, options), [10, ROWS - 10])
    for own, (grid, codes) in zip((weight[:10], weight[10:]), parts, strict=True):
        alone = CODECS[type_name].dequantize(*quantize(type_name, own, curvature, options))
        torch.testing.assert_close(CODECS[type_name].dequantize(grid, codes), alone)


@pytest.mark.parametrize("type_name", TYPES)
def test_state_dequantizes_what_the_file_stores(type_name: str) -> None:
    weight = weights()
    codec = CODECS[type_name]
    grid, codes = codec.choose(weight, None)
    state = RowsState(codec, grid, weight.T.contiguous(), codes)
    assert torch.equal(state.dequantize().T, codec.dequantize(grid, codes))
    assert torch.equal(codec.dequantize(state.grid(), state.codes()), codec.dequantize(grid, codes))
    if type_name != "MXFP4":  # which has two codes for zero
        assert torch.equal(state.codes(), codes)
        assert torch.equal(codec.pack(state.grid(), state.codes()), codec.pack(grid, codes))


@pytest.mark.parametrize("type_name", TYPES)
def test_a_sweep_says_by_how_much_the_error_changed(type_name: str) -> None:
    weight, codec = weights(), CODECS[type_name]
    inputs = torch.randn(1000, weight.shape[1], generator=torch.Generator().manual_seed(3))
    hessian = inputs.T @ inputs / 1000
    grid, codes = codec.choose(weight, None)
    state = RowsState(codec, grid, weight.T.contiguous(), codes)
    before = state.error(hessian).sum()
    change = state.sweep(hessian)
    torch.testing.assert_close(state.error(hessian).sum() - before, change, rtol=2e-3, atol=1e-7)
    assert change <= 0
