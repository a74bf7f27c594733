"""Which compiled loops there are for second-order rounding; without any, rows_state.py and second_order.py have their own."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lowbit.methods.compiling import available


def kernels_for(tensor: Tensor) -> Any:
    """The module with this tensor's loops: Triton's on a GPU, numba's on a CPU; None where numba is not installed."""
    if tensor.is_cuda:
        from lowbit.methods.kquants import kernels

        return kernels
    if not available():
        return None
    from lowbit.methods.kquants import cpu_kernels

    return cpu_kernels
