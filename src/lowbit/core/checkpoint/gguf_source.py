"""A GGUF model in one file or several, tensor by tensor, under its own names: as stored, or dequantized."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowbit.core.checkpoint.gguf_header import GgufHeader, GgufTensor, read_gguf_header
from lowbit.core.errors import CheckpointError

_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class GgufSource:
    """Tensors and metadata of a GGUF model. file: of a split model, any of its files. wait_for: of a file that is still being
    written, called with the bytes that must be there before a tensor is read.

    Raises CheckpointError for missing or damaged files, and when a tensor is in two of them.
    """

    def __init__(self, file: Path, wait_for: Callable[[int], None] | None = None) -> None:
        files = sibling_shards(file)
        missing = [file.name for file in files if not file.is_file()]
        if missing and len(files) == 1:
            raise CheckpointError(f"{file} does not exist")
        if missing:
            raise CheckpointError(f"{missing[0]} is missing in {files[0].parent}", hint="copy all files of the model")
        self.files, self.wait_for = files, wait_for
        self.headers = [read_gguf_header(file, growing=wait_for is not None) for file in files]
        self.metadata: dict[str, Any] = self.headers[0].metadata
        self.tensors: dict[str, GgufTensor] = {}
        self._places: dict[str, Path] = {}
        for file, header in zip(files, self.headers, strict=True):
            for name, tensor in header.tensors.items():
                if name in self.tensors:
                    raise CheckpointError(f"tensor {name[:80]!r} is in {self._places[name].name} and in {file.name}")
                self.tensors[name] = tensor
                self._places[name] = file

    @property
    def location(self) -> Path:
        """The first file."""
        return self.files[0]

    @property
    def header(self) -> GgufHeader:
        """The first file's header, which has all metadata."""
        return self.headers[0]

    @property
    def data_end(self) -> int:
        """Bytes up to the end of the last tensor, in a file alone."""
        return max((tensor.offset + tensor.nbytes for tensor in self.tensors.values()), default=0)

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the model family."""
        return str(self.metadata.get("general.architecture", ""))

    def number(self, key: str, default: int = 0) -> int:
        """A whole number of the architecture ("block_count"); of an array with one value a block, the first."""
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if isinstance(value, list):
            value = value[0] if value else default
        return value if isinstance(value, int) else default

    def stored(self, name: str) -> Tensor:
        """A tensor's bytes, uint8 [nbytes]. Raises CheckpointError."""
        data = torch.from_numpy(np.empty(self.tensors[name].nbytes, dtype=np.uint8))
        self.read_into(name, 0, data)
        return data

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Fill `out`, contiguous uint8 on the CPU, with a tensor's bytes from number `start` on. Raises CheckpointError."""
        tensor, file = self.tensors[name], self._places[name]
        if self.wait_for is not None:
            self.wait_for(tensor.offset + start + len(out))
        left = memoryview(out.numpy().data)
        try:
            with file.open("rb", buffering=0) as stream:
                stream.seek(tensor.offset + start)
                while left and (count := stream.readinto(left)):
                    left = left[count:]
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
        if left:
            raise CheckpointError(f"{file} became shorter while it was read")

    def dense(self, name: str) -> Tensor:
        """A tensor dequantized, float32. Raises CheckpointError for a type that cannot be read."""
        return dequantized(self.stored(name), self.tensors[name])

    def identity(self) -> str:
        """A hash of names, sizes, headers and change times."""
        digest = hashlib.sha256()
        for file, header in zip(self.files, self.headers, strict=True):
            stat = file.stat()
            with file.open("rb") as stream:
                digest.update(stream.read(header.data_start))
            digest.update(f"{stat.st_size} {stat.st_mtime_ns}".encode())
        return digest.hexdigest()


def dequantized(data: Tensor, tensor: GgufTensor) -> Tensor:
    """float32 of the tensor's shape from its bytes, uint8, on their device. Raises CheckpointError for unreadable types."""
    if tensor.ggml_type in _FLOATS:
        return data.view(_FLOATS[tensor.ggml_type]).to(torch.float32).view(tensor.shape)
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    try:
        rows = data.cpu().numpy().reshape(*tensor.shape[:-1], -1)
        dense = dequantize(rows, GGMLQuantizationType[tensor.ggml_type])
    except NotImplementedError as error:  # gguf-py's word for types that it cannot dequantize
        raise CheckpointError(f"{tensor.name} is stored as {tensor.ggml_type}, which cannot be read") from error
    return torch.from_numpy(np.ascontiguousarray(dense, dtype=np.float32)).to(data.device).view(tensor.shape)


def shard_name(name: str, index: int, count: int) -> str:
    """ "model.gguf", 0, 3 -> "model-00001-of-00003.gguf", llama.cpp's name of a part (llama_split_path)."""
    return f"{name.removesuffix('.gguf')}-{index + 1:05}-of-{count:05}.gguf"


def sibling_shards(file: Path) -> list[Path]:
    """All files of a split model, given one of them; just that file when it is no split."""
    found = _SPLIT.fullmatch(file.name)
    if found is None:
        return [file]
    count = int(found[3])
    return [file.with_name(shard_name(f"{found[1]}.gguf", index, count)) for index in range(count)]
