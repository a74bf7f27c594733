"""Which tensor of a GGUF file is which linear layer, and in which order its rows are.

llama.cpp's converter permutes the rows of q and k for its rope in some families. Nothing here knows which: the rows are
found again by their content, so a family whose converter does more than move rows is noticed instead of damaged.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.core.checkpoint.gguf_source import GgufSource
from lowbit.core.errors import ArchitectureError
from lowbit.core.streamed_model import StreamedModel


@dataclass(frozen=True)
class LinearTensor:
    """A linear layer of a block and its tensor. path: module path; name: within its block; tensor: name in the file."""

    path: str
    name: str
    tensor: str
    block: int


def linear_tensors(model: StreamedModel, source: GgufSource) -> dict[str, LinearTensor]:
    """Linear layers of all blocks that are one matrix of the file, by module path, in order of execution.

    Fused experts have no matrix of their own and are left out. Raises ArchitectureError for a family that gguf's table
    of names does not know.
    """
    name_of = _name_map(source, len(model.blocks))
    found = {}
    for index, block in enumerate(model.blocks):
        for name in (name for group in model.architecture.linears for name in group):
            path = f"{model.block_path(index)}.{name}"
            tensor = f"{name_of(path)}.weight"
            weight = block.get_submodule(name).get_parameter("weight")
            shape = tuple(weight.shape)
            expected = shape[::-1] if model.architecture.transposed else shape
            if tensor in source.tensors and source.tensors[tensor].shape == expected:
                found[path] = LinearTensor(path, name, tensor, index)
    return found


def norm_tensors(model: StreamedModel, source: GgufSource) -> dict[str, str]:
    """Weights of the blocks' norms -> their tensors, float32 and equal to them but for a constant (some families store
    1 + weight). Raises ArchitectureError when one of them is not so."""
    name_of = _name_map(source, len(model.blocks))
    found = {}
    for index, block in enumerate(model.blocks):
        for name, parameter in block.named_parameters():
            if parameter.dim() != 1 or not name.endswith(".weight"):
                continue
            path = f"{model.block_path(index)}.{name}"
            tensor = source.tensors.get(f"{name_of(path.removesuffix('.weight'))}.weight")
            if tensor is None or tensor.ggml_type != "F32" or tensor.shape != tuple(parameter.shape):
                raise ArchitectureError(f"{path} has no float32 tensor of its own in GGUF", hint="--tune 0")
            moved = source.dense(tensor.name) - model.checkpoint.read(model.stored_name(path)).float()
            if not torch.allclose(moved, moved.round().mean(), atol=1e-6):
                raise ArchitectureError(f"the converter changed the values of {path}", hint="--tune 0")
            found[path] = tensor.name
    return found


def row_order(stored: Tensor, converted: Tensor) -> Tensor | None:
    """[out] int64 `order` with converted == stored[order], for matrices [out, in] alike but for the order of rows; None
    when the converter did more than move rows. Compared in float16, which every source of weights can give."""
    left, right = stored.to(torch.float16).contiguous(), converted.to(torch.float16).contiguous()
    if torch.equal(left, right):
        return torch.arange(len(left))
    places: dict[bytes, list[int]] = defaultdict(list)
    for place, row in reversed(list(enumerate(_as_bytes(left)))):
        places[row].append(place)
    order = []
    for row in _as_bytes(right):
        if not places[row]:
            return None
        order.append(places[row].pop())
    return torch.tensor(order)


def _name_map(source: GgufSource, blocks: int) -> Callable[[str], str | None]:
    """Hugging Face's name of a module -> the file's. Raises ArchitectureError for an unknown family."""
    from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES
    from gguf.tensor_mapping import get_tensor_name_map

    arch = next((key for key, name in MODEL_ARCH_NAMES.items() if name == source.architecture), None)
    if not isinstance(arch, MODEL_ARCH):
        raise ArchitectureError(
            f"the installed gguf package does not know the family {source.architecture!r}, so that its layers cannot be "
            "calibrated",
            hint="--refine none; or a newer gguf package",
        )
    names = get_tensor_name_map(arch, blocks)
    return lambda path: names.get_name(path)


def _as_bytes(matrix: Tensor) -> list[bytes]:
    # adding zero makes a negative zero positive: they are equal, but not by their bytes
    return [row.tobytes() for row in (matrix.cpu() + 0.0).numpy()]
