"""The column loops on a GPU against PyTorch's on the CPU, which test_gptq.py checks against the paper."""

from __future__ import annotations

import pytest
import torch

from lowbit.core.primitives import Grid
from lowbit.methods import columns, refine

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@pytest.mark.parametrize(("rows", "count"), [(75, 96), (16, 512), (300, 40), (8200, 48)])
def test_loops_equal_pytorchs(rows: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "available", lambda: False)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(8 * count, 2 * count, generator=generator) * torch.rand(2 * count, generator=generator)
    hessian = inputs.T @ inputs / count + torch.eye(2 * count) * 0.01
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    weight = torch.randn(rows, 2 * count, generator=generator) * 0.02
    gradient = torch.randn(rows, 2 * count, generator=generator) * 0.01
    grid = Grid(
        torch.rand(rows, 8, generator=generator) * 0.004 + 0.002,
        torch.randint(0, 16, (rows, 8), generator=generator).float(),
    )
    groups, here = torch.arange(2 * count) * 8 // (2 * count), slice(count // 2, count // 2 + count)
    results = []
    for device in ("cuda", "cpu"):
        own = [tensor.to(device) for tensor in (weight, factor, gradient, hessian, groups)]
        there = Grid(grid.scale.to(device), grid.zero.to(device))
        # parts of larger matrices, as the blocks of columns are
        codes, errors = columns.compensate(own[0][:, here], own[1][here, here], there, own[4][here], 15)
        after = codes.repeat(1, 2)
        moved = columns.descend_(own[2][:, here], own[3][here, here], there, own[4][here], after[:, :count], 15)
        assert torch.equal(after[:, count:], codes)
        results.append([tensor.cpu() for tensor in (codes, errors, after[:, :count], moved)])
    (codes, errors, after, moved), (plain_codes, plain_errors, plain_after, plain_moved) = results
    equal = codes == plain_codes
    assert equal.float().mean() > 0.999
    rows_alike = equal.all(1)
    torch.testing.assert_close(errors[rows_alike], plain_errors[rows_alike], rtol=1e-3, atol=1e-5)
    assert (after != plain_after).float().mean() < 5e-3
    assert (after != codes).float().mean() > 0.05
    alike = (after == plain_after) & equal
    torch.testing.assert_close(moved[alike], plain_moved[alike], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("rows", "size", "count"), [(75, 16, 5), (200, 128, 3), (64, 64, 32), (9, 40, 3)])
def test_scale_systems_equal_pytorchs(rows: int, size: int, count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    columns = size * count
    offsets = torch.randint(-8, 8, (rows, columns), generator=generator).float()
    inputs = torch.randn(2 * columns, columns, generator=generator)
    hessian = inputs.T @ inputs / len(inputs)
    expected = refine.scale_systems(offsets.double(), hessian.double(), count)
    found = refine.scale_systems(offsets.cuda(), hessian.cuda(), count).cpu().double()
    # rounded to 11 bits, of numbers that cancel
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3 * expected.abs().max().item())
