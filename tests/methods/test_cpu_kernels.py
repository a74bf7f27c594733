"""The compiled loops against the PyTorch ones, which test_gptq.py checks against the paper."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lowbit.core.primitives import Grid, group_of_columns, search_grid, to_codes
from lowbit.core.scheme import WeightScheme
from lowbit.methods import columns
from lowbit.methods.compiling import compiled

cpu_kernels = pytest.importorskip("lowbit.methods.cpu_kernels", reason="numba is not installed")


def matrices(rows: int = 75, count: int = 96) -> tuple[torch.Tensor, torch.Tensor, Grid, torch.Tensor]:
    """(weight, symmetric positive definite matrix, grid of 6 groups, each column's group), of which the weight is no whole
    block of memory."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4 * count, count, generator=generator) * torch.rand(count, generator=generator)
    weight = torch.randn(rows, 2 * count, generator=generator)[:, ::2] * 0.02
    scale = torch.rand(rows, 6, generator=generator) * 0.004 + 0.002
    scale *= torch.randn(rows, 1, generator=generator).sign()
    zero = torch.randint(0, 16, (rows, 6), generator=generator).float()
    groups = torch.arange(count) * 6 // count
    return weight, inputs.T @ inputs / count + torch.eye(count) * 0.01, Grid(scale, zero), groups


@pytest.mark.parametrize("threads", [1, 3])
def test_loops_equal_pytorchs(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    weight, hessian, grid, groups = matrices()
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 0.01
    results = []
    for compiles in (True, False):
        monkeypatch.setattr(columns, "available", lambda compiles=compiles: compiles)
        codes, errors = columns.compensate(weight, factor, grid, groups, 15)
        after = codes.clone()
        moved = columns.descend_(gradient, hessian, grid, groups, after, 15)
        results.append((codes, errors, after, moved))
    (codes, errors, after, moved), (plain_codes, plain_errors, plain_after, plain_moved) = results
    assert torch.equal(codes, plain_codes)
    torch.testing.assert_close(errors, plain_errors, rtol=1e-3, atol=1e-5)
    assert (after != plain_after).float().mean() < 1e-3
    assert (after != codes).float().mean() > 0.05
    same = after == plain_after
    torch.testing.assert_close(moved[same], plain_moved[same], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(moved, (codes - after) * grid.scale[:, groups], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("bits", "size", "symmetric"), [(4, 32, True), (4, 32, False), (3, 96, False), (8, 0, True)])
def test_the_grid_is_the_one_that_pytorch_finds(bits: int, size: int, symmetric: bool, dtype: torch.dtype) -> None:
    weight, hessian, _, _ = matrices()
    weight[3] = 0
    cost = hessian.diagonal().contiguous()
    scheme = WeightScheme(bits=bits, group_size=size, symmetric=symmetric, granularity="group" if size else "channel")
    ours, plain = (search(weight, scheme, dtype, cost) for search in (cpu_kernels.search_grid, search_grid))
    groups = group_of_columns(96, scheme, weight.device)

    def error(grid: Grid) -> torch.Tensor:
        codes = to_codes(weight, grid.scale[:, groups], grid.zero[:, groups], scheme.max_code)
        return (((codes - grid.zero[:, groups]) * grid.scale[:, groups] - weight).square() * cost).sum(1)

    # sums in another order decide between candidates that are equally good
    assert torch.isclose(ours.scale, plain.scale, rtol=0.1).float().mean() > 0.9
    torch.testing.assert_close(error(ours), error(plain), rtol=0.01 if bits < 8 else 0.05, atol=1e-12)
    assert torch.equal(ours.scale, ours.scale.to(dtype).float()), "a scale that cannot be stored"


def test_compiles_where_nothing_can_be_kept() -> None:
    """numba finds no place for what has no file, as for a package on a read-only root without a home."""
    code = compile("def twice(x):\n    return 2 * x\n", "<nowhere>", "exec")
    made: dict[str, Any] = {}
    exec(code, made)
    assert compiled()(made["twice"])(21) == 42
