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


def encode_natively(kind: GGMLType, weights: Tensor, importance: Tensor | None) -> Tensor | None:
    """Finite float32 weights [rows, cols] on the CPU as uint8 [rows, bytes_per_row]; None where C cannot or must not."""
    if weights.is_cuda or importlib.util.find_spec("libgguf") is None or not weights.numel():
        return None
    if float(weights.abs().amax()) > _LARGEST:
        return None
    import libgguf

    means = None if importance is None else importance.numpy()
    pieces = torch.split(weights.contiguous(), max(1, _PIECE // weights.shape[1]))
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        parts = list(pool.map(lambda rows: libgguf.quantize_rows(rows.numpy(), kind.id, means), pieces))
    return torch.cat([torch.from_numpy(part) for part in parts])
