"""A Hugging Face directory of safetensors files, sharded or not.

Tensors are read with pread into their own memory rather than through mmap: pages of a mapped file count as resident
memory until the file is closed, so a mapped 70B checkpoint would look like (and under a container limit be) 140 GB.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.core.contracts import TensorSpec
from lowbit.core.errors import CheckpointError

SAFETENSORS_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_MAX_HEADER = 100 * 2**20
_COMPANIONS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "preprocessor_config.json",
)


@dataclass(frozen=True)
class _Slot:
    """Where one tensor lies: `nbytes` bytes at `offset` of `file`."""

    file: Path
    offset: int
    spec: TensorSpec


def read_header(file: Path) -> tuple[dict[str, tuple[TensorSpec, int]], int]:
    """Parse and check one safetensors header.

    Returns name -> (spec, absolute offset of its bytes), and the length of the header in bytes.
    Raises CheckpointError when the file is not a complete, consistent safetensors file; never allocates more than
    100 MiB for a header, whatever it claims.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(size - 8, _MAX_HEADER):
                raise _broken(file, f"its header claims {length} bytes, the file has {size}")
            header = json.loads(stream.read(length).decode())
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise _broken(file, "its header is not JSON") from error
    if not isinstance(header, dict):
        raise _broken(file, "its header is not a JSON object")
    header.pop("__metadata__", None)
    entries = {name: _entry(file, name, entry, 8 + length, size) for name, entry in header.items()}
    return entries, 8 + length


def _entry(file: Path, name: str, entry: Any, start: int, size: int) -> tuple[TensorSpec, int]:
    try:
        dtype = SAFETENSORS_DTYPES[entry["dtype"]]
        shape = tuple(int(n) for n in entry["shape"])
        begin, end = (int(n) for n in entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise _broken(file, f"the entry of tensor {name[:80]!r} is malformed or of an unknown type") from error
    spec = TensorSpec(dtype, shape)
    if min(shape, default=0) < 0 or begin < 0 or end - begin != spec.nbytes:
        raise _broken(file, f"tensor {name[:80]!r} has {end - begin} bytes where its shape needs {spec.nbytes}")
    if start + end > size:
        raise _broken(file, f"it ends {start + end - size} bytes before tensor {name[:80]!r} does")
    return spec, start + begin


def _broken(file: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{file.name} is truncated or damaged: {what}", hint=f"download it again (the file lies in {file.parent})"
    )


class SafetensorsCheckpoint:
    """contracts.Checkpoint over a local directory. Raises CheckpointError from the constructor for anything missing."""

    def __init__(self, location: Path) -> None:
        self.location = location
        self.config = read_json(location / "config.json")
        self._slots: dict[str, _Slot] = {}
        for file in _weight_files(location):
            for name, (spec, offset) in read_header(file)[0].items():
                self._slots[name] = _Slot(file, offset, spec)

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        return {name: slot.spec for name, slot in self._slots.items()}

    def read(self, name: str) -> Tensor:
        slot = self._slots.get(name)
        if slot is None:
            raise CheckpointError(f"{self.location} has no tensor {name!r}")
        tensor = torch.empty(slot.spec.shape, dtype=slot.spec.dtype)
        view = tensor.reshape(-1).view(torch.uint8).numpy().data
        with slot.file.open("rb", buffering=0) as stream:
            position = 0
            while position < len(view):
                count = os.preadv(stream.fileno(), [view[position:]], slot.offset + position)
                if count == 0:
                    raise _broken(slot.file, f"tensor {name!r} ends early")
                position += count
        return tensor

    def companions(self) -> dict[str, Path]:
        found = {name: self.location / name for name in _COMPANIONS if (self.location / name).is_file()}
        found.update({file.name: file for file in sorted(self.location.glob("*.tiktoken"))})
        return found

    def identity(self) -> str:
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for file in sorted({slot.file for slot in self._slots.values()}):
            length = read_header(file)[1]
            with file.open("rb") as stream:
                digest.update(stream.read(length))
            digest.update(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}".encode())
        return digest.hexdigest()


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError."""
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{file.parent} has no {file.name}",
            hint="give the directory of a Hugging Face checkpoint, a hub id or a .gguf file",
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is not a JSON object")
    return content


def _weight_files(location: Path) -> list[Path]:
    index = location / "model.safetensors.index.json"
    if index.exists():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise CheckpointError(f"{index} names no shards", hint="download it again")
        names = sorted({str(name) for name in shards.values()})
        missing = [name for name in names if not (location / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{location} lacks {len(missing)} of {len(names)} shards: {', '.join(missing[:3])}",
                hint="download the missing files again",
            )
        return [location / name for name in names]
    single = sorted(location.glob("*.safetensors"))
    if single:
        return single
    pickles = sorted(location.glob("pytorch_model*.bin")) + sorted(location.glob("*.pt*"))
    if pickles:
        raise CheckpointError(
            f"{location} holds pickled weights ({pickles[0].name}), which can run code when read; refused",
            hint='convert once, in a sandbox: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{location}').save_pretrained('{location}-safetensors')\"",
        )
    partial = sorted(location.glob("*.incomplete")) + sorted(location.glob("*.part"))
    if partial:
        raise CheckpointError(f"{location} is a broken-off download ({partial[0].name})", hint="download it again")
    raise CheckpointError(f"{location} holds no *.safetensors files", hint="give a directory with safetensors weights")
