"""Scales for a KV cache of 8 bit floats: found while calibrating, stored beside the attention they belong to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lowbit.core.architectures import Architecture
from lowbit.core.errors import RecipeError

if TYPE_CHECKING:
    from lowbit.pipeline.block import BlockJob

_LARGEST = 448.0
# rotary embeddings mix pairs of channels after the key projection: no key grows by more than this
_ROTATION = math.sqrt(2)


def cached_layers(architecture: Architecture, model_type: str) -> tuple[str, str]:
    """Names within the block of the layers that make keys and values. Raises RecipeError where they are fused."""
    names = [name for group in architecture.linears for name in group]
    keys = next((name for name in names if name.endswith(".k_proj")), None)
    values = next((name for name in names if name.endswith(".v_proj")), None)
    if keys is None or values is None:
        raise RecipeError(
            f"model type {model_type!r} has no separate key and value projections, whose outputs an FP8 KV cache needs "
            "scales for",
            hint="--kv-cache none; vLLM's --kv-cache-dtype fp8 works without stored scales too",
        )
    return keys, values


def scale_names(keys: str, values: str, format: str) -> tuple[str, str]:
    """Names within the block of the stored scales: ModelOpt puts them into the projections, compressed-tensors beside."""
    if format == "modelopt":
        return f"{keys}.k_scale", f"{values}.v_scale"
    parent = keys.rpartition(".")[0]
    return f"{parent}.k_scale", f"{parent}.v_scale"


def cache_scales(job: BlockJob, layers: Sequence[str]) -> list[Tensor]:
    """[] float32 for keys and for values: the largest output of each over all calibration windows, on the largest code."""
    assert job.arriving is not None
    largest = dict.fromkeys(layers, 0.0)

    def watch(name: str) -> torch.utils.hooks.RemovableHandle:
        def hook(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
            largest[name] = max(largest[name], output.abs().max().item())
            if name == layers[-1]:
                raise _Seen

        return job.module.get_submodule(name).register_forward_hook(hook)

    handles = [watch(name) for name in layers]
    try:
        for where in job.arriving.batches():
            with suppress(_Seen):
                job.model.run_block(job.index, job.module, job.arriving.get(where, job.model.device))
    finally:
        for handle in handles:
            handle.remove()
    keys, values = (max(largest[name], 1e-6) for name in layers)
    return [torch.tensor(keys * _ROTATION / _LARGEST), torch.tensor(values / _LARGEST)]


class _Seen(Exception):  # noqa: N818 - control flow, not an error
    """Values come last: the rest of the block need not run."""
