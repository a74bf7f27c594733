"""Between files and a GPU: bytes pass through page-locked memory in pieces, on streams beside the one that computes.

A copy from or to ordinary memory holds the driver until it is done, and with it the thread that launches kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import numpy
import torch
from torch import Tensor

_PIECE = 1 << 25
_READERS = 4  # one alone does not keep a fast disk busy


class Upload:
    """Puts bytes onto a GPU, given by a few threads; whatever their number, it takes four pieces of memory (128 MiB) here.
    A context manager."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = ThreadPoolExecutor(_READERS, thread_name_prefix="read-piece")
        self._free: SimpleQueue[Tensor] = SimpleQueue()
        for _ in range(_READERS):
            self._free.put(_page_locked())

    def __enter__(self) -> Upload:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def filled(self, nbytes: int, fill: Callable[[int, Tensor], object]) -> Tensor:
        """Bytes on the GPU, uint8 [nbytes], complete; memory of a stream of its own. fill(start, piece): puts those from
        number `start` on into uint8 [n]; what it raises is raised."""
        with torch.cuda.stream(self._stream):
            data = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        list(self._pool.map(lambda start: self._copy(start, fill, data), range(0, nbytes, _PIECE)))
        return data

    def tensor(self, tensor: Tensor) -> Tensor:
        """A tensor of the CPU on the GPU, contiguous."""
        flat = tensor.contiguous().view(-1).view(torch.uint8)
        data = self.filled(len(flat), lambda start, piece: _copy_plainly(piece, flat[start : start + len(piece)]))
        return data.view(tensor.dtype).view(tensor.shape)

    def _copy(self, start: int, fill: Callable[[int, Tensor], object], data: Tensor) -> None:
        out = data[start : start + _PIECE]
        memory = self._free.get()
        try:
            piece = memory[: len(out)]
            fill(start, piece)
            with torch.cuda.stream(self._stream):
                out.copy_(piece, non_blocking=True)
            self._stream.record_event().synchronize()
        finally:
            self._free.put(memory)


class Download:
    """Brings results from a GPU while it computes on."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._memory = _page_locked()

    def pieces(self, data: Tensor, ready: torch.cuda.Event) -> Iterator[Tensor]:
        """The bytes of contiguous uint8 data of any shape, computed at `ready`, in pieces; each holds until the next."""
        self._stream.wait_event(ready)
        for part in torch.split(data.view(-1), _PIECE):
            piece = self._memory[: len(part)]
            with torch.cuda.stream(self._stream):
                piece.copy_(part, non_blocking=True)
            self._stream.record_event().synchronize()
            yield piece

    def tensor(self, tensor: Tensor, ready: torch.cuda.Event) -> Tensor:
        """A tensor of the GPU, computed at `ready`, on the CPU, contiguous."""
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            tensor = tensor.contiguous()
        data, at = torch.empty(tensor.nbytes, dtype=torch.uint8), 0
        for piece in self.pieces(tensor.view(-1).view(torch.uint8), ready):
            _copy_plainly(data[at : at + len(piece)], piece)
            at += len(piece)
        return data.view(tensor.dtype).view(tensor.shape)


def _copy_plainly(target: Tensor, source: Tensor) -> None:
    """Copy bytes [n] on the CPU in this thread alone: there are several such threads already, in each process that quantizes,
    and PyTorch would share every copy out among all cores, the launching thread's included."""
    numpy.copyto(target.numpy(), source.numpy())


def _page_locked() -> Tensor:
    return torch.empty(_PIECE, dtype=torch.uint8, pin_memory=True)
