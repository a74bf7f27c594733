"""Writing GGUF: every file has its full size and header from the start, and tensors are put in their places as they come."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lowbit.formats.gguf import GgufFile
from lowbit.pipeline.writer import output_errors, sha256_of


class GgufWriter:
    """The files of one model in `directory`; opening it again with the same layout continues. Raises OutputError."""

    def __init__(self, directory: Path, files: Sequence[GgufFile]) -> None:
        self.directory, self.files = directory, list(files)
        self._places = {name: (directory / file.name, at) for file in files for name, at in file.offsets.items()}
        with output_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
            for file in files:
                _reserve(directory / file.name, file)

    def write(self, name: str, data: Tensor) -> None:
        """Put a tensor's bytes, uint8 of any shape, in their place."""
        file, position = self._places[name]
        view = memoryview(data.detach().cpu().contiguous().view(-1).numpy().data)
        with output_errors(file), file.open("r+b", buffering=0) as stream:
            done = 0
            while done < len(view):
                done += os.pwrite(stream.fileno(), view[done:], position + done)

    def read(self, name: str, nbytes: int) -> Tensor:
        """A tensor's bytes as they were written, uint8 [nbytes]."""
        file, position = self._places[name]
        with output_errors(file), file.open("rb") as stream:
            stream.seek(position)
            return torch.frombuffer(bytearray(stream.read(nbytes)), dtype=torch.uint8)

    def sync(self) -> None:
        """Make what was written survive a crash of the machine."""
        with output_errors(self.directory):
            for file in self.files:
                descriptor = os.open(self.directory / file.name, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)

    def finish(self) -> dict[str, str]:
        """File name -> sha256, once all is written."""
        self.sync()
        return {file.name: sha256_of(self.directory / file.name) for file in self.files}


def _reserve(path: Path, file: GgufFile) -> None:
    if path.exists() and path.stat().st_size == file.size:
        with path.open("rb") as stream:
            if stream.read(len(file.header)) == file.header:
                return
    with path.open("wb") as stream:
        stream.write(file.header)
        os.posix_fallocate(stream.fileno(), 0, file.size)
