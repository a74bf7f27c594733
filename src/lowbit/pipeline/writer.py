"""Writing an artifact: every shard has its full size and header from the start, tensors are put in their place as they
come. A full disk is noticed before any work, a crash loses nothing that was written, and the bytes do not depend on the
order or number of attempts."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lowbit.core.checkpoint.safetensors import SAFETENSORS_DTYPES, read_header
from lowbit.core.contracts import TensorSpec
from lowbit.core.errors import OutputError

MAX_SHARD = 5 * 10**9
_HASHED = 2**24
_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


@dataclass(frozen=True)
class _Shard:
    name: str
    tensors: dict[str, TensorSpec]


class ShardedWriter:
    """A directory of safetensors shards of at most 5 GB. layout: every tensor that will be written.

    Opening an existing directory with the same layout continues it. Raises OutputError.
    """

    def __init__(self, directory: Path, layout: Mapping[str, TensorSpec]) -> None:
        self.directory = directory
        self.shards = _divide(layout)
        self._places: dict[str, tuple[Path, int, TensorSpec]] = {}
        self._written: set[str] = set()
        self._digests = {shard.name: Digest(directory / shard.name) for shard in self.shards}
        with output_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
            self._check_space()
            for shard in self.shards:
                self._place(shard)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put one tensor in its place; it must have the planned dtype and shape."""
        file, offset, spec = self._places[name]
        if (tensor.dtype, tuple(tensor.shape)) != (spec.dtype, spec.shape):
            raise ValueError(f"{name}: planned {spec}, got {tensor.dtype} {tuple(tensor.shape)}")
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        with output_errors(self.directory), file.open("r+b", buffering=0) as stream:
            view, position = data.data, 0
            while position < len(view):
                position += os.pwrite(stream.fileno(), view[position:], offset + position)
        self._written.add(name)
        self._digests[file.name].changed(offset)

    def sync(self) -> None:
        """Make what was written survive a crash of the machine."""
        with output_errors(self.directory):
            for shard in self.shards:
                descriptor = os.open(self.directory / shard.name, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)

    def hash_ahead(self) -> None:
        """Hash as far as each file has been written without gaps, so that little is left to hash at the end."""
        ends = {file.name: file.stat().st_size for file in {place[0] for place in self._places.values()}}
        for name, (file, offset, _) in self._places.items():
            if name not in self._written:
                ends[file.name] = min(ends[file.name], offset)
        with output_errors(self.directory):
            for shard, end in ends.items():
                self._digests[shard].advance(end)

    def finish(self) -> dict[str, str]:
        """Write the index (for several shards); returns file name -> sha256 of the weights."""
        if len(self.shards) > 1:
            total = sum(spec.nbytes for _, _, spec in self._places.values())
            weight_map = {name: shard.name for shard in self.shards for name in shard.tensors}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(self.directory / "model.safetensors.index.json", index)
        self.sync()
        with output_errors(self.directory), ThreadPoolExecutor() as pool:
            return dict(zip(self._digests, pool.map(Digest.whole, self._digests.values()), strict=True))

    def _check_space(self) -> None:
        # asked before it is taken: a failing fallocate first fills the disk for everybody else on the machine
        need = sum(spec.nbytes for shard in self.shards for spec in shard.tensors.values())
        have = sum((self.directory / s.name).stat().st_size for s in self.shards if (self.directory / s.name).exists())
        if need - have > shutil.disk_usage(self.directory).free:
            raise OSError(errno.ENOSPC, "not enough space")

    def _place(self, shard: _Shard) -> None:
        file = self.directory / shard.name
        header = _header(shard.tensors)
        size = len(header) + sum(spec.nbytes for spec in shard.tensors.values())
        if not file.exists() or file.stat().st_size != size:
            with file.open("wb") as stream:
                stream.write(header)
                os.posix_fallocate(stream.fileno(), 0, size)
        for name, (spec, offset) in read_header(file)[0].items():
            self._places[name] = (file, offset, spec)


class Digest:
    """sha256 of a file that grows from its beginning."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._hash, self._end = hashlib.sha256(), 0

    @property
    def end(self) -> int:
        """How many bytes have been hashed."""
        return self._end

    def changed(self, offset: int) -> None:
        """Bytes from `offset` on are others now: what was hashed of them does not count."""
        if offset < self._end:
            self._hash, self._end = hashlib.sha256(), 0

    def advance(self, end: int) -> None:
        """Hash the file up to `end`."""
        with self.file.open("rb", buffering=0) as stream:
            stream.seek(self._end)
            while self._end < end and (piece := stream.read(min(_HASHED, end - self._end))):
                self._hash.update(piece)
                self._end += len(piece)

    def whole(self) -> str:
        """Hex digest of all of it."""
        self.advance(self.file.stat().st_size)
        return self._hash.hexdigest()


def stored_bytes(layout: Mapping[str, TensorSpec]) -> int:
    """Bytes of all shards of an artifact, headers and all."""
    return sum(
        len(_header(shard.tensors)) + sum(spec.nbytes for spec in shard.tensors.values()) for shard in _divide(layout)
    )


def _divide(layout: Mapping[str, TensorSpec]) -> list[_Shard]:
    groups: list[dict[str, TensorSpec]] = [{}]
    room = MAX_SHARD
    for name, spec in layout.items():
        if spec.nbytes > room and groups[-1]:
            groups.append({})
            room = MAX_SHARD
        groups[-1][name] = spec
        room -= spec.nbytes
    if len(groups) == 1:
        return [_Shard("model.safetensors", groups[0])]
    return [_Shard(f"model-{i:05}-of-{len(groups):05}.safetensors", group) for i, group in enumerate(groups, 1)]


def _header(tensors: Mapping[str, TensorSpec]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    # in the order in which they will come, so that what is written can be hashed
    order = list(tensors.items())
    if not _aligned(spec for _, spec in order):
        order.sort(key=lambda item: -item[1].dtype.itemsize)
    position = 0
    for name, spec in order:
        end = position + spec.nbytes
        entries[name] = {"dtype": _DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _aligned(specs: Iterable[TensorSpec]) -> bool:
    """Whether tensors one after another each begin at a multiple of their own width; wider types first always do."""
    position = 0
    for spec in specs:
        if position % spec.dtype.itemsize:
            return False
        position += spec.nbytes
    return True


class output_errors(contextlib.AbstractContextManager["output_errors"]):  # noqa: N801 - reads as a statement
    """Turns what the file system refuses into an OutputError with the mend."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, OSError):
            return
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(_existing(self.path)).free / 2**30
            raise OutputError(
                f"the disk of {self.path} is full ({free:.2f} GiB free)",
                hint="free some space or choose another disk with -o, then run the same command again: it resumes",
            ) from error
        raise OutputError(
            f"{self.path} cannot be written: {error.strerror or error}", hint="choose another directory with -o"
        ) from error


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)


def write_json(file: Path, content: Any) -> None:
    """Write JSON through a temporary file, so that it is there whole or not at all."""
    with output_errors(file):
        temporary = file.with_name(f".{file.name}.tmp")
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        temporary.replace(file)


def save_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file through a temporary one, so that it is there whole or not at all. Raises OutputError."""
    temporary = file.with_suffix(".tmp")
    with output_errors(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file(
                {name: tensor.cpu() for name, tensor in tensors.items()}, temporary, metadata=dict(metadata or {})
            )
        except SafetensorError as error:
            temporary.unlink(missing_ok=True)
            # it gives the system's error as text
            found = re.search(r"os error (\d+)", str(error))
            number = int(found[1]) if found else errno.EIO
            raise OSError(number, os.strerror(number)) from error
        temporary.replace(file)


def sha256_of(file: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
