"""The GGUF container, written: headers as bytes, exact sizes and places, and llama.cpp's naming of split files.

Layout: the GGUF specification (ggml, docs/gguf.md), version 3, little endian; splits as in llama.cpp,
tools/gguf-split/gguf-split.cpp.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lowbit.core.checkpoint.gguf_header import GgufHeader
from lowbit.core.checkpoint.gguf_source import shard_name
from lowbit.core.errors import RecipeError
from lowbit.core.ggml_types import ggml_type

MAGIC, VERSION = b"GGUF", 3
_UINT16, _UINT32, _INT32, _STRING, _ARRAY = 2, 4, 5, 8, 9


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written: shape outermost first, stored as `ggml_type`."""

    name: str
    shape: tuple[int, ...]
    ggml_type: str

    @property
    def rows(self) -> int:
        """All rows of all outer dimensions."""
        count = 1
        for size in self.shape[:-1]:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        """Bytes of the data, without padding."""
        return self.rows * ggml_type(self.ggml_type).row_bytes(self.shape[-1])


@dataclass(frozen=True)
class GgufFile:
    """One file to be written: name, its whole header with padding, each tensor's absolute offset, and the file's size."""

    name: str
    header: bytes
    offsets: dict[str, int]
    size: int


def copied_pairs(source: Path, header: GgufHeader, without: Sequence[str] = ()) -> dict[str, bytes]:
    """Keys of a GGUF file with their values, byte for byte, but for those named and all about splits."""
    with source.open("rb") as stream:
        pairs = {}
        for key, (start, stop) in header.spans.items():
            if key not in without and not key.startswith("split."):
                stream.seek(start)
                pairs[key] = stream.read(stop - start)
    return pairs


def text_pair(key: str, value: str) -> bytes:
    """A string under a key, as bytes of the header."""
    return _string(key) + struct.pack("<I", _STRING) + _string(value)


def texts_pair(key: str, values: Sequence[str]) -> bytes:
    """An array of strings under a key."""
    return (
        _string(key) + struct.pack("<IIQ", _ARRAY, _STRING, len(values)) + b"".join(_string(value) for value in values)
    )


def number_pair(key: str, value: int, *, kind: str = "uint32") -> bytes:
    """A whole number under a key; kind: uint16, uint32 or int32."""
    code, layout = {"uint16": (_UINT16, "<IH"), "uint32": (_UINT32, "<II"), "int32": (_INT32, "<Ii")}[kind]
    return _string(key) + struct.pack(layout, code, value)


def lay_out(
    name: str,
    pairs: Mapping[str, bytes],
    tensors: Sequence[PlannedTensor],
    *,
    alignment: int = 32,
    max_shard: int | None = None,
) -> list[GgufFile]:
    """The files that hold `tensors`: one called `name`, or several of at most `max_shard` bytes of data (a tensor is never
    divided) in llama.cpp's split naming; the first carries all pairs. Raises RecipeError for more than 65,535 of them."""
    parts = _divide(tensors, alignment, max_shard)
    if len(parts) == 1:
        return [_file(name, list(pairs.values()), parts[0], alignment)]
    if len(parts) > 65_535:
        raise RecipeError(f"{len(parts)} shards are more than GGUF can count", hint="a larger --max-shard-size")
    files = []
    for index, part in enumerate(parts):
        split = [
            number_pair("split.no", index, kind="uint16"),
            number_pair("split.count", len(parts), kind="uint16"),
            number_pair("split.tensors.count", len(tensors), kind="int32"),
        ]
        own = [*pairs.values(), *split] if index == 0 else split
        files.append(_file(shard_name(name, index, len(parts)), own, part, alignment))
    return files


def _divide(tensors: Sequence[PlannedTensor], alignment: int, limit: int | None) -> list[list[PlannedTensor]]:
    parts: list[list[PlannedTensor]] = [[]]
    used = 0
    for tensor in tensors:
        size = _padded(tensor.nbytes, alignment)
        if limit is not None and parts[-1] and used + size > limit:
            parts.append([])
            used = 0
        parts[-1].append(tensor)
        used += size
    return parts


def _file(name: str, pairs: Sequence[bytes], tensors: Sequence[PlannedTensor], alignment: int) -> GgufFile:
    start = MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(pairs)) + b"".join(pairs)
    entries, places, position = [], {}, 0
    for tensor in tensors:
        places[tensor.name] = position
        dimensions = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
        entries.append(_string(tensor.name) + dimensions + struct.pack("<IQ", ggml_type(tensor.ggml_type).id, position))
        position += _padded(tensor.nbytes, alignment)
    header = start + b"".join(entries)
    header += bytes(_padded(len(header), alignment) - len(header))
    offsets = {tensor: len(header) + place for tensor, place in places.items()}
    return GgufFile(name, header, offsets, len(header) + position)


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data
