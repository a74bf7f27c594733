"""A GGUF file as what is to be quantized."""

from __future__ import annotations

from pathlib import Path

from lowbit.core.checkpoint.gguf_source import GgufSource
from lowbit.core.errors import CheckpointError
from lowbit.core.ggml_types import GGML_TYPES

_FLOATS = ("F32", "F16", "BF16")


def opened(file: Path, *, allow_requantize: bool) -> GgufSource:
    """A GGUF model as a source. Raises CheckpointError for one that is quantized, unless that is allowed."""
    source = GgufSource(file)
    if "general.architecture" not in source.metadata:
        raise CheckpointError(f"{file.name} holds no model: it names no architecture")
    quantized = sorted({tensor.ggml_type for tensor in source.tensors.values()} - set(_FLOATS))
    unknown = [name for name in quantized if name not in GGML_TYPES]
    if quantized and not allow_requantize:
        raise CheckpointError(
            f"{file.name} is quantized already ({', '.join(quantized)}); to do so again costs accuracy",
            hint="start from F16, BF16 or F32, or add --allow-requantize",
        )
    if unknown:
        raise CheckpointError(f"{file.name} has tensors of {', '.join(unknown)}, which lowbit does not write")
    return source
