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


def matrices(rows: int = 75, count: int = 96) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(weight, symmetric positive definite matrix, scale, zero), of which the weight is no whole block of memory."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4 * count, count, generator=generator) * torch.rand(count, generator=generator)
    weight = torch.randn(rows, 2 * count, generator=generator)[:, ::2] * 0.02
    scale = (torch.rand(rows, count, generator=generator) * 0.004 + 0.002) * torch.randn(
        rows, 1, generator=generator
    ).sign()
    zero = torch.randint(0, 16, (rows, count), generator=generator).float()
    return weight, inputs.T @ inputs / count + torch.eye(count) * 0.01, scale, zero


@pytest.mark.parametrize("threads", [1, 3])
def test_loops_equal_pytorchs(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    weight, hessian, scale, zero = matrices()
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    codes, errors = cpu_kernels.compensate(weight, factor, scale, zero, 15)
    gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 0.01
    moved = cpu_kernels.descend(gradient, hessian, scale, zero, codes, 15)
    monkeypatch.setattr(columns, "available", lambda: False)
    plain_codes, plain_errors = columns.compensate(weight, factor, scale, zero, 15)
    assert torch.equal(codes, plain_codes)
    torch.testing.assert_close(errors, plain_errors, rtol=1e-3, atol=1e-5)
    plain_moved = columns.descend(gradient, hessian, scale, zero, codes, 15)
    assert (moved != plain_moved).float().mean() < 1e-3
    assert (moved != codes).float().mean() > 0.05


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
