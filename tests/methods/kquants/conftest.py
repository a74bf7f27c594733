"""Where kernels of Triton run."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture(scope="module")
def device() -> str:
    """A GPU, or the CPU for the interpreter of Triton."""
    if torch.cuda.is_available():
        return "cuda"
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no GPU here; TRITON_INTERPRET=1 runs this without one")
    return "cpu"
