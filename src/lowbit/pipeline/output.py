"""What a run leaves behind, block by block: stored in the background while the next block is computed.

A block is in the journal only once its tensors are safely on disk, in the order of the blocks; so a crash costs the block
in hand and at most one that was still being written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
        self._begun: Future[None] | None = None

    def outside(self, tensors: Tensors) -> None:
        self._begin(list(tensors()), lambda: None)

    def block(self, index: int, tensors: Tensors, report: Mapping[str, Any]) -> None:
        super().block(index, tensors, report)
        self._begin(list(tensors()), lambda: self.journal.done(index, report))

    def wait(self) -> None:
        if self._begun is not None:
            self._begun.result()
            self._begun = None

    def _begin(self, tensors: list[tuple[str, Tensor]], then: Callable[[], None]) -> None:
        self.wait()
        on_gpu = next((tensor.device for _, tensor in tensors if tensor.is_cuda), None)
        made = None if on_gpu is None else torch.cuda.current_stream(on_gpu).record_event()
        self._begun = self._thread.submit(self._store, tensors, on_gpu, made, then)

    def _store(
        self,
        tensors: list[tuple[str, Tensor]],
        device: torch.device | None,
        made: torch.cuda.Event | None,
        then: Callable[[], None],
    ) -> None:
        if device is None or made is None:
            self._write(tensors)
        else:
            # a stream of its own: copies need not wait for what the next block has queued meanwhile
            with torch.cuda.stream(torch.cuda.Stream(device)):  # type: ignore[no-untyped-call]  # torch's own
                torch.cuda.current_stream(device).wait_event(made)
                self._write(tensors)
        self.writer.sync()
        then()
        self.writer.hash_ahead()

    def _write(self, tensors: list[tuple[str, Tensor]]) -> None:
        for name, tensor in tensors:
            self.writer.write(name, tensor)
        tensors.clear()
