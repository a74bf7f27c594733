"""numba, which compiles the inner loops of methods on a CPU where it is installed (the extra `cpu`)."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable
from typing import Any


@functools.cache
def available() -> bool:
    """Whether numba is installed. Every compiled loop has one in PyTorch beside it that gives the same but for rounding."""
    return importlib.util.find_spec("numba") is not None


def compiled(**options: object) -> Callable[[Any], Any]:
    """numba.njit, kept on disk beside its file or in ~/.cache; where neither can be written, compiled anew each time."""
    import numba

    def decorate(function: Any) -> Any:
        made = numba.njit(nogil=True, error_model="numpy", **options)(function)
        with contextlib.suppress(RuntimeError):  # numba's, of a root and a home that are read-only
            made.enable_caching()
        return made

    return decorate
