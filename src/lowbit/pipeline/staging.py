"""Between files and a GPU: bytes pass through page-locked memory in pieces, on streams beside the one that computes."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import torch
from torch import Tensor

from lowbit.core.checkpoint.gguf_source import GgufSource

_PIECE = 1 << 25
_READERS = 4  # one alone does not keep a fast disk busy


class Upload:
    """Puts tensors' bytes onto a GPU, read by a few threads; whatever their size, it takes four pieces of memory (128 MiB)
    here. A context manager."""

    def __init__(self, source: GgufSource, device: torch.device) -> None:
        self.source, self.device = source, device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's own
        self._pool = ThreadPoolExecutor(_READERS, thread_name_prefix="read-piece")
        self._free: SimpleQueue[Tensor] = SimpleQueue()
        for _ in range(_READERS):
            self._free.put(_page_locked())

    def __enter__(self) -> Upload:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def stored(self, name: str) -> Tensor:
        """A tensor's bytes, uint8 [nbytes], complete; memory of a stream of its own. Raises CheckpointError."""
        nbytes = self.source.tensors[name].nbytes
        with torch.cuda.stream(self._stream):
            data = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        starts = range(0, nbytes, _PIECE)
        list(self._pool.map(lambda start: self._copy(name, start, data[start : start + _PIECE]), starts))
        return data

    def _copy(self, name: str, start: int, out: Tensor) -> None:
        memory = self._free.get()
        try:
            piece = memory[: len(out)]
            self.source.read_into(name, start, piece)
            with torch.cuda.stream(self._stream):
                out.copy_(piece, non_blocking=True)
            self._stream.record_event().synchronize()
        finally:
            self._free.put(memory)


class Download:
    """Brings results from a GPU while it computes on."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's own
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


def _page_locked() -> Tensor:
    return torch.empty(_PIECE, dtype=torch.uint8, pin_memory=True)
