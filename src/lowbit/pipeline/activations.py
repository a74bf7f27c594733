"""The hidden states of all calibration windows between two blocks, in 16 bits: on the GPU, in memory, or spilled to disk."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor


class Activations:
    """[windows, tokens, hidden], read and written a batch of windows at a time.

    place: device that holds them. spill: a directory; when given they lie in an unlinked file there instead of memory.
    first, total: which of all the run's windows these are, when several processes share them.
    room: bytes that may be kept beside them on their way through a block; by default as many as all windows' states take.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        place: torch.device,
        batch: int,
        spill: Path | None = None,
        *,
        first: int = 0,
        total: int | None = None,
        room: int | None = None,
    ) -> None:
        self.batch = batch
        self.first, self.total = first, shape[0] if total is None else total
        self.spilled = spill is not None
        if spill is None:
            self.states = torch.empty(shape, dtype=dtype, device=place)
        else:
            count = shape[0] * shape[1] * shape[2]
            with tempfile.NamedTemporaryFile(dir=spill, prefix="activations-") as file:
                # the mapping outlives the name: the space is given back when the process ends, however it ends
                self.states = torch.from_file(file.name, shared=True, size=count, dtype=dtype).view(shape)
        self.room = self.states[:1].nbytes * self.total if room is None else room

    def batches(self) -> Iterator[slice]:
        """Slices over the windows."""
        for start in range(0, len(self.states), self.batch):
            yield slice(start, min(start + self.batch, len(self.states)))

    def get(self, where: slice, device: torch.device) -> Tensor:
        """One batch on the computing device."""
        return self.states[where].to(device, non_blocking=True)

    def put(self, where: slice, hidden: Tensor) -> None:
        """Replace one batch."""
        self.states[where] = hidden
