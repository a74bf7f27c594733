"""ggml's own C row quantizers, through libgguf where that is installed: the codecs' bytes, a dozen times faster on a CPU.

The codecs here are what runs on a GPU, and the grids that second-order rounding starts from; both are tested to give the
same bytes (tests/methods/kquants).
"""

from __future__ import annotations

import importlib.util
from concurrent.futures import ThreadPoolExecutor

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
    if weights.is_cuda or importlib.util.find_spec("libgguf") is None or largest > _LARGEST:
        return False
    import libgguf

    means = None if importance is None else importance.numpy()

    def fill(rows: Tensor, place: Tensor) -> None:
        place.numpy()[:] = libgguf.quantize_rows(rows.contiguous().numpy(), kind.id, means)

    step = max(1, _PIECE // weights.shape[1])
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(fill, torch.split(weights, step), torch.split(out, step)))
    return True
