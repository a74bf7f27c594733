"""ggml's own C row quantizers on a CPU, where llama.cpp is installed as xllamacpp: the codecs' bytes, many times faster.

The codecs here are what runs on a GPU, and the grids that second-order rounding starts from; both are tested to give the
same bytes (tests/methods/kquants).
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from lowbit.core.ggml_types import GGMLType

# weights a call: enough that threads do not wait for each other
_PIECE = 1 << 17
# below it no type's scale overflows float16, which C would store as infinity
_LARGEST = 65504.0


def fill_natively(kind: GGMLType, weights: Tensor, importance: Tensor | None, largest: float, out: Tensor) -> bool:
    """Encode finite float32 weights [rows, cols] on the CPU into `out`, uint8 [rows, bytes_per_row]; False, with nothing
    done, where C cannot or must not. largest: of the weights' absolute values."""
    quantize = None if weights.is_cuda or largest > _LARGEST else _quantize_chunk()
    if quantize is None:
        return False
    means = None if importance is None else importance.contiguous()

    def fill(rows: Tensor, place: Tensor) -> None:
        rows = rows.contiguous()
        given = None if means is None else means.data_ptr()
        quantize(kind.id, rows.data_ptr(), place.data_ptr(), 0, len(rows), rows.shape[1], given)

    step = max(1, _PIECE // weights.shape[1])
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(fill, torch.split(weights, step), torch.split(out, step)))
    return True


@functools.cache
def _quantize_chunk() -> Callable[..., int] | None:
    """ggml_quantize_chunk(type, source, destination, start, rows, columns, importance) of ggml/include/ggml.h, which lets go
    of the interpreter's lock; None where xllamacpp is not installed or does not show it."""
    found = importlib.util.find_spec("xllamacpp")
    for folder in (found.submodule_search_locations or ()) if found else ():
        for file in Path(folder).glob("xllamacpp*.so"):
            function = getattr(ctypes.CDLL(str(file)), "ggml_quantize_chunk", None)
            if function is not None:
                number, pointer, count = ctypes.c_int, ctypes.c_void_p, ctypes.c_int64
                function.argtypes = [number, pointer, pointer, count, count, count, pointer]
                function.restype = ctypes.c_size_t
                return function  # type: ignore[no-any-return]  # ctypes' symbols have no types
    return None
