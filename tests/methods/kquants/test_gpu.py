"""The GPU's searches and rounding against the PyTorch ones, number for number: on a GPU, or in Triton's interpreter where
Triton is installed without one. (test_codecs.py compares the bytes that come of them with ggml's, on either device.)"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from lowbit.methods.kquants import arithmetic, grid, iq4, search, symmetric
from lowbit.methods.kquants.constants import AffineSearch

from .distributions import DISTRIBUTIONS, generator

triton = pytest.importorskip("triton")

LANES = 6  # of every distribution: together they fill one program
AFFINE = [
    (32, AffineSearch(15, -1.0, 0.1, 20)),
    (16, AffineSearch(3, -0.5, 0.1, 15, absolute_error=True)),
    (16, AffineSearch(31, -0.9, 0.05, 36)),
]


def sub_blocks(n: int) -> Tensor:
    """[n, B] of every distribution."""
    parts = [make(generator(name)).flatten()[: n * LANES].view(LANES, n) for name, make in DISTRIBUTIONS.items()]
    return torch.cat(parts).T.contiguous()


def some_weights(x: Tensor) -> Tensor:
    g = torch.Generator().manual_seed(0)
    return x.abs().clamp_(max=1e18) * torch.rand(x.shape, generator=g) * (torch.rand(x.shape, generator=g) < 0.8)


def assert_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=0, equal_nan=True)
        # a file stores the sign of a zero too
        assert torch.equal(ours.cpu().signbit()[theirs == 0], theirs.signbit()[theirs == 0])


@pytest.mark.parametrize(("n", "wanted"), AFFINE)
def test_affine(n: int, wanted: AffineSearch, device: str) -> None:
    from lowbit.methods.kquants import gpu

    x = sub_blocks(n)
    w = some_weights(x)
    found = gpu.search_affine(x.to(device), w.to(device), wanted)
    assert_same(found, search._search_affine_slice(x, w, wanted))


@pytest.mark.parametrize(("n", "half"), [(16, 32), (16, 4), (32, 8)])
def test_symmetric(n: int, half: int, device: str) -> None:
    from lowbit.methods.kquants import gpu

    x = sub_blocks(n)
    for w in (x * x, some_weights(x)):
        found = gpu.search_symmetric(x.to(device), w.to(device), half)
        assert_same(found, symmetric._search_symmetric_slice(x, w, half))


def test_descending(device: str) -> None:
    from lowbit.methods.kquants import gpu

    x = sub_blocks(16)
    found = gpu.search_descending(x.to(device), 4)
    assert_same(found, symmetric._search_descending_slice(x, 4))


def test_uneven(device: str) -> None:
    from lowbit.methods.kquants import gpu

    x = sub_blocks(32)
    for w in (x * x, some_weights(x)):
        assert_same((gpu.search_uneven(x.to(device), w.to(device)),), (iq4._search_slice(x, w),))


def test_sums_in_order(device: str) -> None:
    from lowbit.methods.kquants import gpu

    x = sub_blocks(256).view(256, 2, -1)
    assert_same((gpu.sequential_sum(x.to(device)),), (arithmetic.sequential_sum(x),))


@pytest.mark.parametrize(("n", "top"), [(8, 63), (16, 15)])
def test_positive(n: int, top: int, device: str) -> None:
    from lowbit.methods.kquants import gpu

    x = sub_blocks(n).abs()
    w = some_weights(x)
    found = gpu.search_positive(x.to(device), w.to(device), top)
    assert_same(found, search.search_positive(x, w, top))


@pytest.mark.parametrize(("n", "low", "high", "shifted"), [(32, 0, 15, True), (16, -32, 31, False), (16, 0, 3, True)])
def test_rounding_onto_a_grid(n: int, low: int, high: int, shifted: bool, device: str) -> None:
    from lowbit.methods.kquants import gpu

    weights = sub_blocks(n).T.contiguous()
    g = torch.Generator().manual_seed(0)
    # ordinary scales, scales far too small, and none
    d = (
        weights.abs().amax(1, keepdim=True)
        / high
        * torch.tensor([1.0, 1.0, 1e-4])[torch.arange(len(weights)) % 3, None]
    )
    d = torch.where(torch.rand(d.shape, generator=g) < 0.1, 0.0, d)
    minimum = -weights.amin(1, keepdim=True).clamp(max=0) if shifted else None
    found = gpu.round_uniform(weights.to(device), d.to(device), _moved(minimum, device), low, high)
    assert torch.equal(found.cpu(), grid.round_uniform(weights, grid.Grid(d, minimum), low, high))


def _moved(tensor: Tensor | None, device: str) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


@pytest.mark.skipif(torch.cuda.is_available() or "TRITON_INTERPRET" in os.environ, reason="runs as it is")
def test_the_same_in_the_interpreter() -> None:
    """Triton reads its setting at import, so the interpreter needs a process of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", __file__]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "." * 14 in done.stdout, done.stdout[-2000:]
