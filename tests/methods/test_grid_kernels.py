"""The grid search on a GPU against the PyTorch one; skipped where there is no GPU."""

from __future__ import annotations

import pytest
import torch

from lowbit.core.primitives import Grid, group_of_columns, search_grid, to_codes
from lowbit.core.scheme import WeightScheme

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("bits", "size", "symmetric"), [(4, 128, True), (4, 128, False), (3, 64, False), (8, 96, True)]
)
def test_the_kernel_finds_the_grid_that_pytorch_finds(
    bits: int, size: int, symmetric: bool, dtype: torch.dtype
) -> None:
    from lowbit.methods import grid_kernels

    generator = torch.Generator("cuda").manual_seed(0)
    weight = torch.randn(257, 768, device="cuda", generator=generator) * 0.02
    weight[3] = 0
    cost = torch.rand(768, device="cuda", generator=generator) * 100
    scheme = WeightScheme(bits=bits, group_size=size, symmetric=symmetric)
    ours = grid_kernels.search_grid(weight, scheme, dtype, cost)
    plain = search_grid(weight, scheme, dtype, cost)
    groups = group_of_columns(768, scheme, weight.device)

    def error(grid: Grid) -> torch.Tensor:
        codes = to_codes(weight, grid.scale[:, groups], grid.zero[:, groups], scheme.max_code)
        back = (codes - grid.zero[:, groups]) * grid.scale[:, groups]
        return ((weight - back).square() * cost).sum(1)

    # sums in another order decide between candidates that are equally good
    assert torch.isclose(ours.scale, plain.scale, rtol=0.1).float().mean() > 0.9
    torch.testing.assert_close(error(ours), error(plain), rtol=0.01 if bits < 8 else 0.05, atol=1e-12)
