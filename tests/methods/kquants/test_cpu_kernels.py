"""The compiled loops on a CPU against the PyTorch loops."""

from __future__ import annotations

import pytest
import torch

from lowbit.methods.kquants.codec import CODECS
from lowbit.methods.kquants.curvature import factor_gram
from lowbit.methods.kquants.second_order import SecondOrderOptions, _quantize_rows
from tests.methods.kquants.loops import KINDS, assert_same_compensation, assert_same_moves

cpu_kernels = pytest.importorskip("lowbit.methods.kquants.cpu_kernels", reason="numba is not installed")


@pytest.mark.parametrize("rows", [40, 130])
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernels_do_what_the_loops_do(kind: str, rows: int) -> None:
    assert_same_compensation(cpu_kernels, kind, "cpu", rows)
    assert_same_moves(cpu_kernels, kind, rows)


@pytest.mark.parametrize("kind", ["Q3_K", "Q4_K"])
def test_whole_matrices_end_as_well(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(900, 512, generator=generator) * torch.rand(512, generator=generator)
    curvature = factor_gram(inputs.T @ inputs / 900, 0.03)
    weights = torch.randn(96, 512, generator=generator) * 0.02
    errors = []
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr("lowbit.methods.kquants.rows_state.kernels_for", lambda _: None)
        grid, codes = _quantize_rows(CODECS[kind], weights, curvature, SecondOrderOptions())
        residual = weights - CODECS[kind].dequantize(grid, codes)
        errors.append(((residual @ curvature.hessian) * residual).sum())
    torch.testing.assert_close(errors[0], errors[1], rtol=1e-3, atol=0)
