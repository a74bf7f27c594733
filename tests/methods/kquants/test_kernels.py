"""The GPU kernels against the PyTorch loops: on a GPU, or in Triton's interpreter where Triton is installed without one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tests.methods.kquants.loops import KINDS, assert_same_compensation, example, on_device

triton = pytest.importorskip("triton")
# a GPU does all; each shape of a block once is enough for the interpreter, which takes seconds for each
INTERPRETED = ["Q4_K", "Q6_K", "Q5_1", "Q8_0"]


@pytest.fixture
def kind(request: pytest.FixtureRequest, device: str) -> str:
    name: str = request.param
    if device == "cpu" and name not in INTERPRETED:
        pytest.skip("too slow without a GPU")
    return name


@pytest.mark.parametrize("kind", KINDS, indirect=True)
def test_columns_are_compensated_as_in_the_loop(kind: str, device: str) -> None:
    from lowbit.methods.kquants import kernels

    assert_same_compensation(kernels, kind, device)


@pytest.mark.parametrize("kind", [*KINDS, "Q5_K", "Q4_1", "Q5_0"], indirect=True)
def test_a_sweep_is_the_loops(kind: str, device: str) -> None:
    # rows that do not fill the last program, columns that do not fill the last launch
    loop, curvature = example(kind, 18, 512 if kind.endswith("_K") else 288)
    hessian = curvature.hessian
    swept = on_device(loop, device)
    loop.kernels = None
    before = loop.error(hessian)
    expected, change = loop.sweep(hessian), swept.sweep_fused(hessian.to(device))
    torch.testing.assert_close(change.cpu(), expected, rtol=1e-3, atol=0)
    assert (swept.levels.cpu() == loop.levels).float().mean() > 0.995
    assert (swept.d.cpu() == loop.d).float().mean() > 0.98
    swept = on_device(swept, "cpu")
    after = swept.error(hessian)
    assert bool((after <= before * 1.0001).all())
    torch.testing.assert_close(after.sum(), loop.error(hessian).sum(), rtol=1e-3, atol=0)
    quantized = swept.dequantize()
    for empty in (quantized[:, 3], quantized[:32, 5], quantized[:256, 6]):
        assert not empty.any()


@pytest.mark.skipif(torch.cuda.is_available() or "TRITON_INTERPRET" in os.environ, reason="runs as it is")
def test_the_same_in_the_interpreter() -> None:
    """Triton reads its setting at import, so the interpreter needs a process of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", __file__]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    assert done.stdout.count(".") >= 2 * len(INTERPRETED), done.stdout[-2000:]
