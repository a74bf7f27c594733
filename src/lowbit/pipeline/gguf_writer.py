"""Writing GGUF: every file has its full size and header from the start, and tensors are put in their places as they come."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from lowbit.formats.gguf import GgufFile
from lowbit.pipeline.writer import Digest, output_errors

_HASHED = 1 << 22


class GgufWriter:
    """The files of one model in `directory`; opening it again with the same layout continues. Raises OutputError."""

    def __init__(self, directory: Path, files: Sequence[GgufFile]) -> None:
        self.directory, self.files = directory, list(files)
        self._places = {name: (directory / file.name, at) for file in files for name, at in file.offsets.items()}
        self._written: set[str] = set()
        self._digests = {file.name: Digest(directory / file.name) for file in files}
        self._hashing = Lock()
        with output_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
            for file in files:
                _reserve(directory / file.name, file)

    def write(self, name: str, data: Tensor) -> None:
        """Put a tensor's bytes, uint8 of any shape, in their place."""
        self.write_pieces(name, [data.detach().cpu().contiguous().view(-1)])

    def write_pieces(self, name: str, pieces: Iterable[Tensor]) -> None:
        """Put a tensor's bytes in their place, as they come; a piece is uint8 [n] on the CPU."""
        file, position = self._places[name]
        with self._hashing:
            self._written.discard(name)
            self._digests[file.name].changed(position)
        with output_errors(file), file.open("r+b", buffering=0) as stream:
            for piece in pieces:
                left = memoryview(piece.numpy().data)
                while left:
                    count = os.pwrite(stream.fileno(), left, position)
                    left, position = left[count:], position + count
        with self._hashing:
            self._written.add(name)

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

    def hash_ahead(self) -> None:
        """Hash as far as each file has been written without gaps, so that little is left at the end. A thread may do this
        while another writes."""
        for file in self.files:
            digest = self._digests[file.name]
            more = True
            while more:
                with output_errors(self.directory), self._hashing:
                    gaps = (start for name, start in file.offsets.items() if name not in self._written)
                    until = min(gaps, default=file.size)
                    digest.advance(min(until, digest.end + _HASHED))
                    more = digest.end < until

    def finish(self) -> dict[str, str]:
        """File name -> sha256, once all is written."""
        self.sync()
        with output_errors(self.directory), ThreadPoolExecutor() as pool:
            return dict(zip(self._digests, pool.map(Digest.whole, self._digests.values()), strict=True))


def _reserve(path: Path, file: GgufFile) -> None:
    if path.exists() and path.stat().st_size == file.size:
        with path.open("rb") as stream:
            if stream.read(len(file.header)) == file.header:
                return
    with path.open("wb") as stream:
        stream.write(file.header)
        os.posix_fallocate(stream.fileno(), 0, file.size)
