"""A strict reader of GGUF headers: every length is checked against the file before anything is allocated.

Layout: the GGUF specification (ggml, docs/gguf.md), versions 2 and 3, little endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from lowbit.core.errors import CheckpointError

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MAX_KEY = 65_535
_MAX_DIMENSIONS = 4
_MAX_NESTING = 4


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file: shape is outermost first (the reverse of the file's order), offset is absolute."""

    name: str
    shape: tuple[int, ...]
    ggml_type: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """Everything before the data. metadata holds plain Python values; arrays are lists.

    spans: where each key, with its value, lies in the file (start, stop), to be copied as it is.
    """

    version: int
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    alignment: int = 32
    data_start: int = 0
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)


def read_gguf_header(file: Path, *, growing: bool = False) -> GgufHeader:
    """Parse and check the header. growing: the file is still being written, tensors may lie beyond its end. Raises
    CheckpointError for anything that breaks the format or runs over its end."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            return _Parser(file, stream, size, growing).header()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error


class _Parser:
    def __init__(self, file: Path, stream: BinaryIO, size: int, growing: bool) -> None:
        self.file, self.stream, self.size, self.growing = file, stream, size, growing

    def header(self) -> GgufHeader:
        if self.take(4) != b"GGUF":
            raise self.broken("it does not begin with GGUF")
        version = self.number("<I")
        if version not in (2, 3):
            raise self.broken(f"version {version} is not 2 or 3 (big endian files are not read)")
        tensor_count, pair_count = self.number("<Q"), self.number("<Q")
        # a tensor takes at least 24 bytes of header, a pair at least 13: counts beyond that cannot be true
        if tensor_count * 24 + pair_count * 13 > self.size:
            raise self.broken(f"{tensor_count} tensors and {pair_count} keys cannot fit in {self.size} bytes")
        metadata: dict[str, Any] = {}
        spans: dict[str, tuple[int, int]] = {}
        for _ in range(pair_count):
            start = self.stream.tell()
            key = self.text(limit=_MAX_KEY)
            if key in metadata:
                raise self.broken(f"key {key[:80]!r} appears twice")
            metadata[key] = self.value(self.number("<I"), 0)
            spans[key] = (start, self.stream.tell())
        described = [self.describe() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0 or alignment % 8 or alignment > 2**20:
            raise self.broken(f"alignment {str(alignment)[:40]} is not a multiple of 8")
        data_start = -(-self.stream.tell() // alignment) * alignment
        return GgufHeader(version, metadata, self.place(described, data_start), alignment, data_start, spans)

    def describe(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.text(limit=_MAX_KEY)
        dimensions = self.number("<I")
        if dimensions > _MAX_DIMENSIONS:
            raise self.broken(f"tensor {name[:80]!r} has {dimensions} dimensions")
        shape = tuple(self.number("<Q") for _ in range(dimensions))
        return name, shape[::-1], self.number("<I"), self.number("<Q")

    def place(self, described: list[tuple[str, tuple[int, ...], int, int]], data_start: int) -> dict[str, GgufTensor]:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        tensors: dict[str, GgufTensor] = {}
        for name, shape, type_id, offset in described:
            if name in tensors:
                raise self.broken(f"tensor {name[:80]!r} appears twice")
            try:
                ggml_type = GGMLQuantizationType(type_id)
            except ValueError as error:
                raise self.broken(f"tensor {name[:80]!r} has the unknown type {type_id}") from error
            block, block_bytes = GGML_QUANT_SIZES[ggml_type]
            count = 1
            for n in shape:
                count *= n
            if not shape or count == 0 or shape[-1] % block:
                raise self.broken(f"tensor {name[:80]!r} of shape {shape} cannot be {ggml_type.name}")
            nbytes = count // block * block_bytes
            if data_start + offset + nbytes > self.size and not self.growing:
                raise self.broken(f"tensor {name[:80]!r} of shape {shape} runs over the end of the file")
            tensors[name] = GgufTensor(name, shape, ggml_type.name, data_start + offset, nbytes)
        return tensors

    def value(self, kind: int, depth: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text(limit=self.size)
        if kind != _ARRAY or depth >= _MAX_NESTING:
            raise self.broken(f"value type {kind} is unknown")
        item, count = self.number("<I"), self.number("<Q")
        width = struct.calcsize(_SCALARS[item]) if item in _SCALARS else 8
        if count * width > self.size - self.stream.tell():
            raise self.broken(f"an array claims {count} items")
        if item in _SCALARS:
            data = self.take(count * width)
            return list(struct.unpack(f"<{count}{_SCALARS[item][1]}", data))
        return [self.value(item, depth + 1) for _ in range(count)]

    def text(self, limit: int) -> str:
        length = self.number("<Q")
        if length > limit:
            raise self.broken(f"a string claims {length} bytes")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise self.broken("a string is not UTF-8") from None

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def take(self, count: int) -> bytes:
        if count > self.size - self.stream.tell():
            raise self.broken("it ends inside its header")
        return self.stream.read(count)

    def broken(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.file.name} is truncated or damaged: {what}", hint="download it again")
