"""Which compiled loops there are; without any, the modules that ask have their own in PyTorch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lowbit.methods.compiling import available


def kernels_for(tensor: Tensor) -> Any:
    """The module with this tensor's loops of second-order rounding: Triton's on a GPU, numba's on a CPU; None where numba is
    not installed."""
    if tensor.is_cuda:
        from lowbit.methods.kquants import kernels

        return kernels
    if not available():
        return None
    from lowbit.methods.kquants import cpu_kernels

    return cpu_kernels


def gpu_for(tensor: Tensor) -> Any:
    """The package with this tensor's searches, sums and rounding: Triton's on a GPU, None elsewhere."""
    if not tensor.is_cuda:
        return None
    from lowbit.methods.kquants import gpu

    return gpu
