"""AWQ's search against a literal one that keeps the inputs and multiplies them out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lowbit.core.scheme import WeightScheme
from lowbit.core.statistics import InputStatistics
from lowbit.methods.rtn import RtnOptions, quantize, round_trip
from lowbit.transforms.awq import AwqOptions, output_error, scales_of, search
from lowbit.transforms.scaling import Place, Problem
from lowbit.transforms.smoothquant import SmoothQuantOptions, predicted_error, smooth_scales
from lowbit.transforms.smoothquant import search as smooth

SCHEME = WeightScheme("int", 4, "group", 16, symmetric=False)


def problem(repeat: int = 1, outliers: bool = True) -> tuple[Problem, Tensor]:
    """A layer [48, 64] whose inputs have a few strong channels, and those inputs [512, 64]."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(512, 64, generator=draw)
    if outliers:
        x[:, ::9] *= 12
    weight = torch.randn(48, 64, generator=draw)
    statistics = InputStatistics(64, torch.device("cpu"), sample_every=1)
    statistics.add(x)
    statistics.finish()
    place = Place("source", ("target",), 64 // repeat, 64, 8, repeat, 0, 0.0, False, repeat == 1)
    return Problem(place, weight, statistics, lambda w: round_trip(w, SCHEME)), x


def true_error(problem: Problem, x: Tensor, columns: Tensor) -> float:
    """The definition: mean over tokens of the squared change of the layer's outputs."""
    rounded = quantize(problem.weight * columns, None, SCHEME, RtnOptions(search=False)).tensor.dequantize() / columns
    return ((x @ rounded.T - x @ problem.weight.T) ** 2).sum(1).mean().item()


def test_round_trip_is_round_to_nearest() -> None:
    weight = torch.randn(48, 64)
    for scheme in (SCHEME, replace(SCHEME, symmetric=True), WeightScheme("int", 8, "channel", 0)):
        expected = quantize(weight, None, scheme, RtnOptions(search=False)).tensor.dequantize()
        torch.testing.assert_close(round_trip(weight, scheme), expected, rtol=0, atol=1e-6)


def test_the_gram_matrix_prices_what_the_inputs_would() -> None:
    given, x = problem()
    for seed in range(3):
        columns = torch.empty(64).uniform_(0.5, 2, generator=torch.Generator().manual_seed(seed))
        assert output_error(given, columns) == pytest.approx(true_error(given, x, columns), rel=1e-3)


@pytest.mark.parametrize("duo", ["yes", "no", "both"])
def test_search_finds_what_trying_every_ratio_finds(duo: str) -> None:
    given, x = problem()
    power = x.abs().mean(0)
    share = (given.weight.abs() / given.weight.abs().amax(1, keepdim=True)).mean(0)
    forms = {"yes": [share], "no": [None], "both": [share, None]}[duo]
    tried = [torch.ones(64)] + [scales_of(power, form, step / 20) for form in forms for step in range(20)]
    least = min(true_error(given, x, scales) for scales in tried)
    found = true_error(given, x, search(given, AwqOptions(duo=duo)))
    assert found <= least * 1.03
    assert found < 0.8 * true_error(given, x, torch.ones(64))


def test_scales_are_shared_by_the_columns_of_a_value_channel() -> None:
    given, x = problem(repeat=2)
    scales = search(given, AwqOptions())
    assert scales.shape == (32,)
    columns = given.place.to_columns(scales)
    # columns of head h read channel head h // 2: 8 columns a head
    for column in range(64):
        head, within = divmod(column, 8)
        assert columns[column] == scales[(head // 2) * 8 + within]
    assert true_error(given, x, columns) <= true_error(given, x, torch.ones(64))
    assert torch.equal(given.place.by_channel(columns)[0], scales)
    assert torch.equal(given.place.by_channel(columns)[1], scales)


def test_the_module_objective_follows_its_price() -> None:
    given, _ = problem()
    power = given.statistics.absolute / given.statistics.tokens
    wanted = scales_of(power, None, 8 / 20)
    priced = replace(given, price=lambda columns: (columns / wanted).log().square().sum().item())
    torch.testing.assert_close(search(priced, AwqOptions(objective="module")), wanted)
    assert not torch.allclose(search(priced, AwqOptions()), wanted)


def test_smoothquant_is_equation_4() -> None:
    given, x = problem()
    expected = x.abs().amax(0) ** 0.3 / given.weight.abs().amax(0) ** 0.7
    torch.testing.assert_close(smooth(given, SmoothQuantOptions(alpha=0.3)), expected)
    torch.testing.assert_close(smooth_scales(given, 0.3), expected)


def test_smoothquant_leaves_linear_sources_unless_asked() -> None:
    given, _ = problem(repeat=2)
    assert torch.equal(smooth(given, SmoothQuantOptions()), torch.ones(32))
    assert not torch.equal(smooth(given, SmoothQuantOptions(linears=True)), torch.ones(32))


def test_unused_channels_keep_their_scale() -> None:
    given, _ = problem()
    given.statistics.largest[3] = 0
    given.weight[:, 5] = 0
    scales = smooth_scales(given, 0.5)
    assert scales[3] == scales[5] == 1
    assert torch.isfinite(scales).all()


def test_searched_alpha_lowers_the_true_w8a8_error() -> None:
    given, x = problem()
    x[:, 0] *= 30
    statistics = InputStatistics(64, torch.device("cpu"), sample_every=1)
    statistics.add(x)
    statistics.finish()
    scheme = WeightScheme("int", 8, "channel", 0)
    given = replace(given, statistics=statistics, quantize=lambda w: round_trip(w, scheme))

    def simulated(columns: Tensor) -> float:
        weight = quantize(given.weight * columns, None, scheme, RtnOptions(search=False)).tensor.dequantize()
        inputs = x / columns
        step = inputs.abs().amax(1, keepdim=True) / 127
        return ((torch.round(inputs / step) * step @ weight.T - x @ given.weight.T) ** 2).sum(1).mean().item()

    ones = torch.ones(64)
    assert predicted_error(given, ones) == pytest.approx(simulated(ones), rel=0.1)
    found = simulated(smooth(given, SmoothQuantOptions(alpha="auto")))
    assert found < 0.5 * simulated(ones)
    assert found <= 1.1 * min(simulated(smooth_scales(given, alpha / 10)) for alpha in range(1, 10))
