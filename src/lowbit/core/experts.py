"""Mixtures of experts: transformers keeps a layer's experts in two 3-D parameters; checkpoints, runtimes and lowbit have a
linear layer for each projection of each expert."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from lowbit.core.architectures import Architecture
from lowbit.core.errors import ArchitectureError

_FUSED = {"gate_up_proj", "down_proj"}


class Expert(nn.Module):
    """down(act(gate(x)) * up(x)); its three linear layers have the checkpoint's names."""

    def __init__(self, hidden: int, inner: int, activation: nn.Module, names: tuple[str, str, str]) -> None:
        super().__init__()
        self.names, self.activation = names, activation
        for name, (columns, rows) in zip(names, ((hidden, inner), (hidden, inner), (inner, hidden)), strict=True):
            self.add_module(name, nn.Linear(columns, rows, bias=False, device="meta"))

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up, down = (self.get_submodule(name) for name in self.names)
        result: Tensor = down(self.activation(gate(hidden)) * up(hidden))
        return result


class Experts(nn.Module):
    """Takes the place of transformers' fused experts, with the same arguments; children "0", "1", ..."""

    def __init__(self, fused: nn.Module, names: tuple[str, str, str]) -> None:
        super().__init__()
        count, both, hidden = fused.get_parameter("gate_up_proj").shape
        activation = fused.get_submodule("act_fn")
        for number in range(count):
            self.add_module(str(number), Expert(hidden, both // 2, activation, names))

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden [tokens, hidden]; top_k_index, top_k_weights [tokens, k] -> [tokens, hidden]."""
        result = torch.zeros_like(hidden)
        for number, expert in enumerate(self.children()):
            token, place = (top_k_index == number).nonzero(as_tuple=True)
            if len(token):
                weighted = expert(hidden[token]) * top_k_weights[token, place, None]
                result.index_add_(0, token, weighted.to(result.dtype))
        return result


def take_experts_apart(model_type: str, architecture: Architecture, blocks: nn.ModuleList) -> Architecture:
    """Give every expert linear layers of its own, in place; returns the table's row with those layers in it.

    Raises ArchitectureError for fused experts that the table does not describe, or of another layout.
    """
    counts = set()
    for block in blocks:
        fused = {path: module for path, module in block.named_modules() if _is_fused(module)}
        for path, module in fused.items():
            if path != _module_path(architecture):
                raise ArchitectureError(
                    f"model type {model_type!r} keeps experts in one tensor at {path}, which the table of architectures "
                    "does not describe: nothing was done",
                    hint="add `experts` to its row in lowbit/core/architectures.py",
                )
            _check_layout(model_type, module)
            counts.add(len(module.get_parameter("down_proj")))
            parent, _, name = path.rpartition(".")
            setattr(block.get_submodule(parent), name, Experts(module, architecture.expert_linears))
        if fused and architecture.stored_as:
            _rename(block, *architecture.stored_as)
    gate, up, down = architecture.expert_linears
    each = [f"{architecture.experts}.{number}" for number in range(max(counts, default=0))]
    first = tuple((f"{path}.{gate}", f"{path}.{up}") for path in each)
    return replace(architecture, linears=(*architecture.linears, *first, *((f"{path}.{down}",) for path in each)))


def _is_fused(module: nn.Module) -> bool:
    return any(parameter.dim() == 3 and name in _FUSED for name, parameter in module.named_parameters(recurse=False))


def _module_path(architecture: Architecture) -> str:
    if not architecture.stored_as:
        return architecture.experts
    module, stored = architecture.stored_as
    return module + architecture.experts.removeprefix(stored)


def _check_layout(model_type: str, fused: nn.Module) -> None:
    """[gate; up] rows over inputs, and nothing besides."""
    other = {name for name, _ in fused.named_parameters()} != _FUSED
    if other or getattr(fused, "is_transposed", False) or not getattr(fused, "is_concatenated", True):
        raise ArchitectureError(
            f"the experts of model type {model_type!r} are transposed, interleaved or have biases, which lowbit cannot "
            "take apart: nothing was done",
            hint="another model, or a change of lowbit/core/experts.py",
        )


def _rename(block: nn.Module, module: str, stored: str) -> None:
    """Register a child under the checkpoint's name; the block's code still finds it under its own."""
    child = block.get_submodule(module)
    delattr(block, module)
    block.add_module(stored, child)
    object.__setattr__(block, module, child)
