"""What a run will about take, before it starts: peak memory from the plan's sizes, time from its operations over what this
machine does in a quarter of a second of matrix products. For `--dry-run`; good to about a factor of two."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from lowbit.core.hardware import matrix_rate
from lowbit.core.streamed_model import StreamedModel
from lowbit.pipeline.codes import WEIGHT_BYTES
from lowbit.pipeline.learn import learning_layers
from lowbit.pipeline.plan import LayerPlan, Plan
from lowbit.recipe import Recipe

LIBRARIES = 450 * 2**20  # torch and transformers, resident
_MATRIX_COPIES = 6  # float32 copies of a stacked weight that a method holds at its peak
# of a training step: bytes kept of a token for every hidden column, float32 copies of the trained weights, and seconds on a
# GPU however small the block is (launches)
_TOKEN_BYTES, _TRAINED_COPIES, _LAUNCHES = 160, 8, 0.03
# a training step runs a block forward and back; the last pass forward, forward once more and back
_LEARN_PASSES, _TUNE_PASSES = 3, 4
# how much of the rate of large products training reaches: a CPU spends most of it on everything between them
_TRAINING_RATE = {"cpu": 0.25, "gpu": 1.0}


@dataclass(frozen=True)
class Estimate:
    """memory: bytes at the peak, on the computing device. seconds: of quantizing, verification not counted."""

    memory: int
    seconds: float


@dataclass(frozen=True)
class Machine:
    """Operations a second of matrix products: fast in the dtype of the forward passes, exact in float32."""

    kind: Literal["cpu", "gpu"]
    fast: float
    exact: float


# where only memory is asked for
ANY_CPU = Machine("cpu", math.inf, math.inf)


def this_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """Measure a device, for half a second. dtype: of the forward passes."""
    kind: Literal["cpu", "gpu"] = "cpu" if device.type == "cpu" else "gpu"
    return Machine(kind, matrix_rate(device, dtype), matrix_rate(device, torch.float32))


@dataclass(frozen=True)
class Training:
    """learn: gradient steps a block, tune: of the last pass; with so many tokens a step. codes: whether it trains them too."""

    learn: int = 0
    learn_tokens: int = 0
    tune: int = 0
    tune_tokens: int = 0
    codes: bool = False

    def seconds(self, block: int, blocks: int, machine: Machine) -> float:
        """For `blocks` blocks of `block` weights."""
        rate = _TRAINING_RATE[machine.kind] * machine.fast
        learn = self.learn * (_LEARN_PASSES * 2 * block * self.learn_tokens / rate)
        tune = self.tune * (_TUNE_PASSES * 2 * block * self.tune_tokens / rate)
        launches = _LAUNCHES if machine.kind == "gpu" else 0.0
        return blocks * (learn + tune + launches * (self.learn + self.tune / 2))

    def memory(self, block: int, blocks: int, hidden: int) -> int:
        """Bytes of one step's graph beside the block itself, and of all codes in training."""
        learned = self.learn_tokens * hidden * _TOKEN_BYTES + 4 * _TRAINED_COPIES * block if self.learn else 0
        tuned = self.tune_tokens * hidden * _TOKEN_BYTES if self.tune else 0
        return max(learned, tuned + (WEIGHT_BYTES * block * blocks if self.tune and self.codes else 0))


def estimate(plan: Plan, model: StreamedModel, recipe: Recipe, machine: Machine) -> Estimate:
    """Estimate quantizing with the recipe that `plan` was made of."""
    text, sequential = recipe.calibration, recipe.sequential
    streams = 1 + any(layer.method.needs(layer.options).original for layer in plan.layers.values())
    count = text.num_samples * text.seq_len if plan.needs_calibration else 0
    block = sum(parameter.numel() for parameter in model.blocks[0].parameters())
    hidden = model.skeleton.get_input_embeddings().weight.shape[1]
    groups = _input_groups(plan, model)
    stored = 2 * block if plan.dtype == model.dtype else 2 * block + block * model.dtype.itemsize
    working = max((_working_bytes(group, streams) for group in groups), default=0)
    training = _training(plan, recipe)
    # step by step, inputs of the layer in hand are kept as well, up to the size of the states (passage.py)
    states = (streams + sequential) * count * hidden * model.dtype.itemsize
    passes = (2.5 if sequential else 2.0) * streams
    exact = sum(_method_operations(group) for group in groups)
    fast = passes * 2 * block * count + sum(streams * 2 * group[0].shape[1] ** 2 * count for group in groups if count)
    blocks = len(model.blocks)
    seconds = blocks * (fast / machine.fast + exact / machine.exact) + training.seconds(block, blocks, machine)
    libraries = LIBRARIES if machine.kind == "cpu" else 0
    memory = stored + states + max(working, training.memory(block, blocks, hidden)) + libraries
    return Estimate(int(memory), seconds + plan.nbytes / 1e9)


def _training(plan: Plan, recipe: Recipe) -> Training:
    learned = [layer.options for layer in learning_layers(plan.layers)]
    steps, batch = (learned[0].steps, learned[0].batch) if learned else (0, 0)
    tokens = recipe.calibration.seq_len
    tune = recipe.tune
    return Training(steps, batch * tokens, tune.steps, tune.batch * tokens, tune.codes > 0)


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
