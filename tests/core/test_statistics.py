"""Sums over calibration tokens against the same in float64."""

import pytest
import torch

from lowbit.core.statistics import InputStatistics, blocks_above_diagonal, output_powers, rough_products


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("features", [3, 300, 1100])  # 1, 1 and 4 rows of blocks
def test_matrices_are_means_of_outer_products(features: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 700, features, generator=generator).to(dtype)
    original = inputs + torch.randn(2, 700, features, generator=generator).to(dtype) * 0.1
    statistics = InputStatistics(features, torch.device("cpu"), cross=True)
    for given, before in zip(inputs, original, strict=True):
        statistics.add(given[None], before[None])
    statistics.finish()
    x, difference = inputs.view(-1, features).double(), (original - inputs).view(-1, features).double()
    assert statistics.tokens == 1400
    assert statistics.gram is not None
    torch.testing.assert_close(statistics.gram.double(), x.T @ x / 1400, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(statistics.take_cross().double(), difference.T @ x / 1400, rtol=1e-4, atol=1e-5)  # type: ignore[union-attr]
    torch.testing.assert_close(statistics.gram, statistics.gram.T)
    torch.testing.assert_close(statistics.largest, x.abs().amax(0).float())
    torch.testing.assert_close(statistics.absolute, x.abs().sum(0).float(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("features", [1, 255, 513, 1024, 11008])
def test_blocks_cover_the_upper_triangle_once(features: int) -> None:
    seen = torch.zeros(features, features, dtype=torch.int8)
    for rows, columns in blocks_above_diagonal(features):
        seen[rows, columns] += 1
    assert seen.max() == 1
    assert bool((seen >= torch.ones_like(seen).triu()).all())
    if features >= 1024:
        assert seen.sum(dtype=torch.int64) < 0.64 * features**2


def test_rough_products_are_good_for_sums_of_what_does_not_cancel() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(900, 512, generator=generator) * torch.logspace(-1, 1, 512)
    inputs += torch.randn(900, 8, generator=generator) @ torch.randn(8, 512, generator=generator) * 3
    gram, weight = inputs.T @ inputs / 900, torch.randn(300, 512, generator=generator) * 0.02
    with rough_products(weight.device):
        found = ((weight @ gram) * weight).sum()
    expected = ((weight.double() @ gram.double()) * weight.double()).sum()
    assert found.item() == pytest.approx(expected.item(), rel=1e-3)
    torch.testing.assert_close(weight @ gram, (weight.double() @ gram.double()).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("features", [3, 300, 1100])  # 1, 1 and 4 rows of blocks
def test_output_powers_are_those_of_the_outputs(features: int) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, weight = torch.randn(700, features, generator=generator), torch.randn(5, features, generator=generator)
    expected = (inputs.double() @ weight.double().T).square().mean(0)
    torch.testing.assert_close(output_powers(weight, inputs.T @ inputs / 700).double(), expected, rtol=1e-5, atol=0)
