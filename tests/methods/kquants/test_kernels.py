"""The GPU kernels against the PyTorch loops: on a GPU, or in Triton's interpreter where Triton is installed without one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tests.methods.kquants.loops import KINDS, assert_same_as_loops

triton = pytest.importorskip("triton")


@pytest.fixture(scope="module")
def device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no GPU here; TRITON_INTERPRET=1 runs this without one")
    return "cpu"


@pytest.mark.parametrize("kind", KINDS)
def test_the_kernels_do_what_the_loops_do(kind: str, device: str) -> None:
    from lowbit.methods.kquants import kernels

    assert_same_as_loops(kernels, kind, device)


@pytest.mark.skipif(torch.cuda.is_available() or "TRITON_INTERPRET" in os.environ, reason="runs as it is")
def test_the_same_in_the_interpreter() -> None:
    """Triton reads its setting at import, so the interpreter needs a process of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", f"{__file__}::test_the_kernels_do_what_the_loops_do"]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "." * len(KINDS) in done.stdout, done.stdout[-2000:]
