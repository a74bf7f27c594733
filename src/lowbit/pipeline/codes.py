"""Codes in the last pass: where every weight of the blocks' layers stands on its grid, trained end to end.

Quantization-aware training with the base as the teacher, straight-through (LLM-QAT, Liu et al. 2023), from the codes that
another method chose and the weights they stand for. A gradient says little about a single code, so what counts is many
small steps on much text: noise grows with their root, what the text agrees on grows with their number. A block's weights
move as soon as its gradient is known, so no more than one block's gradient exists.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import safe_open
from torch import Tensor

from lowbit.core.errors import RecipeError
from lowbit.core.streamed_model import StreamedModel
from lowbit.core.training import adam_
from lowbit.methods.learning import Learnable

_FORGET = (0.9, 0.99)
# of a weight in training: its place on the grid and Adam's two moments in float32, the code and scale it started from, and
# what one block's gradient takes, spread over the blocks
WEIGHT_BYTES = 16
# and of its training as it is saved: the first three of these, and the code that came of it
SAVED_BYTES = 13


class Codes:
    """blocks: by block the layers in training, by parameter name; their scales do not move here. file: where an earlier run
    saved the training state, if it did. transposed: whether the model keeps its weights as [in, out]."""

    def __init__(self, blocks: Sequence[Mapping[str, Learnable[Any]]], file: Path, *, transposed: bool) -> None:
        self.blocks, self.transposed = blocks, transposed
        self.kept = True
        self._moments = [
            {name: (torch.zeros_like(one.position), torch.zeros_like(one.position)) for name, one in block.items()}
            for block in blocks
        ]
        self._step, self._rate = 0, 0.0
        if file.exists():
            self._load(file)

    def weight(self, index: int, name: str) -> Tensor:
        """A parameter of a block in float32, differentiable by straight-through rounding."""
        weight = self.blocks[index][name].weight()
        return weight.T if self.transposed else weight

    def positions(self, index: int) -> list[Tensor]:
        """The leaves of a block, in the order of its layers."""
        return [one.position for one in self.blocks[index].values()]

    def begin(self, step: int, rate: float) -> None:
        """What the next `descend` of every block does: step number `step`, from 1, of at most `rate` grid steps."""
        self._step, self._rate = step, rate

    @torch.no_grad()
    def descend(self, index: int, gradients: Sequence[Tensor]) -> None:
        """One step of Adam for a block's layers."""
        for (name, one), gradient in zip(self.blocks[index].items(), gradients, strict=True):
            adam_(one.position, gradient, self._moments[index][name], self._step, self._rate, _FORGET)

    def result(self, index: int, name: str) -> Tensor | None:
        """Trained codes [out, in] as the layer's format has them; None where the start is kept."""
        return self.blocks[index][name].result().codes if self.kept and name in self.blocks[index] else None

    def moved(self) -> float:
        """The share of all codes that are others than at the start."""
        layers = [one for block in self.blocks for one in block.values()] if self.kept else []
        changed = sum(int((one.result().codes != one.start.codes).sum()) for one in layers)
        return changed / max(1, sum(one.position.numel() for one in layers))

    def state(self) -> dict[str, Tensor]:
        """Everything that a continued run needs, for `Factors.save`."""
        state = {}
        for index, block in enumerate(self.blocks):
            for name, one in block.items():
                for what, tensor in zip(_STATE, (one.position, *self._moments[index][name]), strict=True):
                    state[f"{index}.{name}.{what}"] = tensor.detach()
        return state

    @torch.no_grad()
    def _load(self, file: Path) -> None:
        with safe_open(file, "pt") as stored:
            for name, tensor in self.state().items():
                tensor.copy_(stored.get_tensor(name))


_STATE = ("position", "first", "second")


def check_memory(model: StreamedModel) -> None:
    """Raises RecipeError where the codes of all blocks cannot be in training at once."""
    weights = sum(math.prod(parameter.shape) for parameter in model.blocks.parameters())
    cuda = model.device.type == "cuda"
    free = torch.cuda.mem_get_info(model.device)[0] if cuda else psutil.virtual_memory().available
    need = WEIGHT_BYTES * weights
    if need > 0.9 * free:
        raise RecipeError(
            f"training codes takes {need / 2**30:.1f} GiB for {weights / 1e9:.2g} billion weights, and {free / 2**30:.1f} GiB "
            f"of the {'GPU' if cuda else 'machine'} are free",
            hint="leave --tune-codes out (scales and norms take little), or choose a device with more memory",
        )
