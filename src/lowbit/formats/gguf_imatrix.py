"""Importance matrices in llama.cpp's GGUF form: per tensor the sums of squared inputs of every column, and token counts.

Source: llama.cpp, tools/imatrix/imatrix.cpp (save_imatrix, load_imatrix) and tools/quantize/quantize.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lowbit.core.checkpoint.gguf_header import GgufHeader, GgufTensor, read_gguf_header
from lowbit.core.errors import CheckpointError
from lowbit.formats.gguf import PlannedTensor, lay_out, number_pair, text_pair, texts_pair

_SUMS, _COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True)
class Importance:
    """Of one tensor: `sums` [matrices, in] float32, sums of squared inputs; `counts` [matrices] float32, tokens seen.

    A tensor of experts has one matrix an expert, any other tensor one.
    """

    sums: Tensor
    counts: Tensor

    def means(self) -> Tensor:
        """[matrices, in] mean squares; ones for a matrix that saw no token, as in llama-quantize."""
        seen = self.counts[:, None] > 0
        return torch.where(seen, self.sums / self.counts.clamp_min(1)[:, None], 1.0)


@dataclass(frozen=True)
class ImportanceMatrix:
    """All tensors' importance by tensor name, what text they come from, and in how many chunks of how many tokens."""

    tensors: dict[str, Importance]
    datasets: tuple[str, ...]
    chunks: int
    chunk_size: int


def write_imatrix(file: Path, matrix: ImportanceMatrix) -> None:
    """Write the file, whole or not at all. Raises OSError."""
    pairs = {
        "general.type": text_pair("general.type", "imatrix"),
        "imatrix.datasets": texts_pair("imatrix.datasets", matrix.datasets),
        "imatrix.chunk_count": number_pair("imatrix.chunk_count", matrix.chunks),
        "imatrix.chunk_size": number_pair("imatrix.chunk_size", matrix.chunk_size),
    }
    data: dict[str, Tensor] = {}
    for name in sorted(matrix.tensors):
        data[name + _SUMS] = matrix.tensors[name].sums
        data[name + _COUNTS] = matrix.tensors[name].counts[:, None]
    planned = [PlannedTensor(name, tuple(tensor.shape), "F32") for name, tensor in data.items()]
    (laid,) = lay_out(file.name, pairs, planned)
    content = bytearray(laid.size)
    content[: len(laid.header)] = laid.header
    for name, tensor in data.items():
        raw = tensor.to(torch.float32).contiguous().numpy().tobytes()
        content[laid.offsets[name] : laid.offsets[name] + len(raw)] = raw
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_bytes(content)
    temporary.replace(file)


def read_imatrix(file: Path) -> ImportanceMatrix:
    """Read llama-imatrix's GGUF output, or ours. Raises CheckpointError."""
    header = read_gguf_header(file)
    if header.metadata.get("general.type") != "imatrix":
        raise CheckpointError(
            f"{file.name} is no importance matrix", hint="llama-imatrix writes one with --output-format gguf"
        )
    sums = {name.removesuffix(_SUMS): tensor for name, tensor in header.tensors.items() if name.endswith(_SUMS)}
    tensors = {name: _importance(file, header, name, tensor) for name, tensor in sums.items()}
    if not tensors:
        raise CheckpointError(f"{file.name} holds no sums of squared inputs", hint="make it again with llama-imatrix")
    return ImportanceMatrix(
        tensors,
        _texts(header.metadata.get("imatrix.datasets")),
        _whole(header, "imatrix.chunk_count"),
        _whole(header, "imatrix.chunk_size"),
    )


def _importance(file: Path, header: GgufHeader, name: str, sums: GgufTensor) -> Importance:
    counts = header.tensors.get(name + _COUNTS)
    if counts is None or {sums.ggml_type, counts.ggml_type} != {"F32"}:
        raise CheckpointError(f"{file.name}: {name[:80]!r} lacks its counts, or is not in 32 bits")
    values, tokens = _read(file, sums), _read(file, counts).flatten()
    values = values.reshape(-1, sums.shape[-1])
    if len(values) != len(tokens):
        raise CheckpointError(f"{file.name}: {name[:80]!r} has {len(values)} sums and {len(tokens)} counts")
    if not bool(torch.isfinite(values).all() & (values >= 0).all() & torch.isfinite(tokens).all()):
        raise CheckpointError(f"{file.name}: {name[:80]!r} holds NaN, infinity or a negative sum")
    return Importance(values, tokens)


def _read(file: Path, tensor: GgufTensor) -> Tensor:
    data = np.fromfile(file, dtype="<f4", count=tensor.nbytes // 4, offset=tensor.offset)
    return torch.from_numpy(data).view(tensor.shape)


def _texts(value: object) -> tuple[str, ...]:
    return tuple(str(item) for item in value) if isinstance(value, list) else ()


def _whole(header: GgufHeader, key: str) -> int:
    value = header.metadata.get(key, 0)
    return value if isinstance(value, int) else 0


def means_of(matrix: Mapping[str, Importance], name: str, matrices: int, columns: int) -> Tensor | None:
    """Mean squares [matrices, columns] of one tensor, or None when it has no entry. Raises CheckpointError for an entry
    of another size, but for the token embedding, whose importance llama-imatrix stores in another form."""
    entry = matrix.get(name)
    if entry is None:
        return None
    if entry.sums.shape == (matrices, columns):
        return entry.means()
    if name == "token_embd.weight":
        return None
    raise CheckpointError(
        f"the importance matrix has {list(entry.sums.shape)} values for {name}, the model [{matrices}, {columns}]",
        hint="it belongs to another model: make one with --dataset, or with llama-imatrix on this model",
    )
