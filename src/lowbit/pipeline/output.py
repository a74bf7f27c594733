"""What a run leaves behind, block by block: stored in the background while the next block is computed.

A block is in the journal only once its tensors are safely on disk, in the order of the blocks; so a crash costs the block
in hand and at most one that was still being written.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.core.staging import Download
from lowbit.pipeline.journal import Journal
from lowbit.pipeline.writer import ShardedWriter

Tensors = Callable[[], Iterator[tuple[str, Tensor]]]


class Output:
    """The part of a process that does not write: it remembers the reports of finished blocks.

    directory: where the leader writes. blocks: reports of the blocks that an earlier run finished.
    """

    def __init__(self, directory: Path, blocks: Mapping[int, dict[str, Any]]) -> None:
        self.directory = directory
        self.blocks = dict(blocks)

    def outside(self, tensors: Tensors) -> None:
        """Tensors that belong to no block."""

    def block(self, index: int, tensors: Tensors, report: Mapping[str, Any]) -> None:
        """The tensors of a finished block, and what the journal says of it. Returns before they are on disk."""
        self.blocks[index] = {"block": index, **report}

    def wait(self) -> None:
        """Until all is on disk. Raises OutputError, as the other calls do for what was begun earlier."""


class WrittenOutput(Output):
    """The leader's: tensors go into the writer's files, then the report into the journal."""

    def __init__(self, writer: ShardedWriter, journal: Journal) -> None:
        super().__init__(writer.directory, journal.blocks)
        self.writer, self.journal = writer, journal
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="output")
        self._outside: Future[None] | None = None
        self._block: Future[None] | None = None
        self._download: Download | None = None

    def outside(self, tensors: Tensors) -> None:
        self._outside = self._thread.submit(lambda: self._store(tensors(), None, lambda: None))

    def block(self, index: int, tensors: Tensors, report: Mapping[str, Any]) -> None:
        super().block(index, tensors, report)
        # an embedding may take longer to store than the first block to compute: that block is not waited with
        if self._block is not None:
            self.wait()
        encoded = list(tensors())
        device = next((tensor.device for _, tensor in encoded if tensor.is_cuda), None)
        if device is not None and self._download is None:
            self._download = Download(device)
        made = None if device is None else torch.cuda.current_stream(device).record_event()
        done = functools.partial(self.journal.done, index, report)
        self._block = self._thread.submit(lambda: self._store(_handed_over(encoded), made, done))

    def wait(self) -> None:
        for begun in (self._outside, self._block):
            if begun is not None:
                begun.result()
        self._outside = self._block = None

    def _store(
        self, tensors: Iterator[tuple[str, Tensor]], made: torch.cuda.Event | None, then: Callable[[], None]
    ) -> None:
        for name, tensor in tensors:
            if made is not None and self._download is not None and tensor.is_cuda:
                self.writer.write(name, self._download.tensor(tensor, made))
            else:
                self.writer.write(name, tensor)
        self.writer.sync()
        then()
        self.writer.hash_ahead()


def _handed_over(tensors: list[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """What is in the list, which gives up each with the next."""
    tensors.reverse()
    while tensors:
        yield tensors.pop()
