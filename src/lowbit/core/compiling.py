"""torch.compile for functions that a training loop calls thousands of times: a GPU then takes a few kernels for what are
dozens of operations, and most of a step's time is matrix products. Compiling takes a minute, so short loops do without."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch

# torch._dynamo.config.recompile_limit, where nobody changed it
MOST_SHAPES = 8
_Function = TypeVar("_Function", bound=Callable[..., object])


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works for this device: a GPU with Triton, and a C compiler for what starts its kernels."""
    if device.type != "cuda":
        return False
    try:
        torch.compile(lambda values: values * 2 + 1)(torch.ones(8, device=device))
    except Exception:  # whatever is missing there, training works without, only slower
        return False
    return True


def compiled(function: _Function) -> _Function:
    """The function compiled for the shapes it is called with, of which there may be `MOST_SHAPES`: with more PyTorch runs it as
    it is, and warns. Numbers among its arguments must not change between calls."""
    return cast(_Function, torch.compile(function, dynamic=False))
