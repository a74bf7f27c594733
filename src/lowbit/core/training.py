"""What every training loop here shares: arithmetic that gives the same numbers every time."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.deterministic
from torch import Tensor


@contextmanager
def reproducible() -> Iterator[None]:
    """Kernels that add up in the same order every time, as far as there are any; `run_module` sees to attention."""
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    filled = settings.fill_uninitialized_memory
    with warnings.catch_warnings():
        # cuBLAS asks for a workspace setting that only matters with several streams
        warnings.filterwarnings("ignore", message=".*[Dd]eterministic.*")
        torch.use_deterministic_algorithms(True, warn_only=True)
        # every new tensor would be filled with NaN first, though none is read before it is written
        settings.fill_uninitialized_memory = False
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warned)
            settings.fill_uninitialized_memory = filled


@contextmanager
def mixed_precision(device: torch.device) -> Iterator[None]:
    """Matrix products in bfloat16, everything else in float32; on a CPU without bfloat16 units all in float32."""
    fast = device.type == "cuda" or torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    with torch.autocast(device.type, torch.bfloat16, enabled=fast):
        yield


def adam_(
    values: Tensor,
    gradient: Tensor,
    moments: tuple[Tensor, Tensor],
    step: int,
    rate: float,
    forget: tuple[float, float],
) -> None:
    """One step of Adam (Kingma and Ba 2014) in place. moments: of the gradient, first and second. step: from 1. forget: what
    each moment keeps of itself."""
    follow_(values, gradient, *moments, *adam_scalars(step, rate, forget), forget)


def adam_scalars(step: int, rate: float, forget: tuple[float, float]) -> tuple[float, float]:
    """(what the first moment is multiplied with, and the second) in a step of Adam: the rate, and the moments' beginning at
    zero made up for."""
    return rate / (1 - forget[0] ** step), 1 / (1 - forget[1] ** step)


def follow_(
    values: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    length: float | Tensor,
    correction: float | Tensor,
    forget: tuple[float, float],
) -> None:
    """`adam_` with its scalars as numbers, or as tensors that may change while the compiled function stays."""
    keep_first, keep_second = forget
    first.lerp_(gradient, 1 - keep_first)
    second.mul_(keep_second).addcmul_(gradient, gradient, value=1 - keep_second)
    values.sub_((first * length).div_((second * correction).sqrt_().add_(1e-8)))
