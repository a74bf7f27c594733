"""What a run will about take, before it starts: peak memory from the plan's sizes, time from its operations over what this
machine does in a quarter of a second of matrix products. For `--dry-run`; good to about a factor of two."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lowbit.core.hardware import matrix_rate
from lowbit.core.streamed_model import StreamedModel
from lowbit.pipeline.plan import LayerPlan, Plan

_LIBRARIES = 500 * 2**20  # torch and transformers, resident
_MATRIX_COPIES = 6  # float32 copies of a stacked weight that a method holds at its peak


@dataclass(frozen=True)
class Estimate:
    """memory: bytes at the peak, on the computing device. seconds: of quantizing, verification not counted."""

    memory: int
    seconds: float


def estimate(plan: Plan, model: StreamedModel, windows: int, tokens: int, *, sequential: bool) -> Estimate:
    """Estimate quantizing on calibration windows [windows, tokens]."""
    streams = 1 + any(layer.method.needs(layer.options).original for layer in plan.layers.values())
    count = windows * tokens if plan.needs_calibration else 0
    block = sum(parameter.numel() for parameter in model.blocks[0].parameters())
    hidden = model.skeleton.get_input_embeddings().weight.shape[1]
    groups = _input_groups(plan, model)
    stored = 2 * block if plan.dtype == model.dtype else 2 * block + block * model.dtype.itemsize
    working = max((_working_bytes(group, streams) for group in groups), default=0)
    # step by step, inputs of the layer in hand are kept as well, up to the size of the states (passage.py)
    states = (streams + sequential) * count * hidden * model.dtype.itemsize
    passes = (2.5 if sequential else 2.0) * streams
    exact = sum(_method_operations(group) for group in groups)
    fast = passes * 2 * block * count + sum(streams * 2 * group[0].shape[1] ** 2 * count for group in groups if count)
    blocks = len(model.blocks)
    seconds = blocks * (
        fast / matrix_rate(model.device, model.dtype) + exact / matrix_rate(model.device, torch.float32)
    )
    memory = stored + states + working + (_LIBRARIES if model.device.type == "cpu" else 0)
    return Estimate(int(memory), seconds + plan.nbytes / 1e9)


def _input_groups(plan: Plan, model: StreamedModel) -> list[list[LayerPlan]]:
    """The first block's layers that are quantized, by shared input."""
    path = model.block_path(0)
    planned = [
        [plan.layers[f"{path}.{name}"] for name in group if f"{path}.{name}" in plan.layers]
        for group in model.architecture.linears
    ]
    return [group for group in planned if group]


def _working_bytes(group: list[LayerPlan], streams: int) -> int:
    rows, columns = sum(layer.shape[0] for layer in group), group[0].shape[1]
    squares = 2 + streams if group[0].method.needs(group[0].options).gram else 0
    return 4 * (squares * columns**2 + _MATRIX_COPIES * rows * columns)


def _method_operations(group: list[LayerPlan]) -> float:
    """Float32 operations of factorizations and column loops; a search over grids costs about 300 a weight."""
    rows, columns = sum(layer.shape[0] for layer in group), group[0].shape[1]
    if not group[0].method.needs(group[0].options).gram:
        return 300.0 * rows * columns
    return 3.0 * columns**3 + 12.0 * rows * columns**2 + 300.0 * rows * columns
