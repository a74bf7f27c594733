"""Which layers make the keys and values of an 8 bit cache, and what the scales stored beside them are called."""

from __future__ import annotations

from lowbit.core.architectures import Architecture
from lowbit.core.errors import RecipeError


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
