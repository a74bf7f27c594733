"""Codes in the last pass: where every weight of the blocks' layers stands on its grid, trained end to end.

Quantization-aware training with the base as the teacher, straight-through (LLM-QAT, Liu et al. 2023), from the codes that
another method chose and the weights they stand for. A gradient says little about a single code, so what counts is many
small steps on much text: noise grows with their root, what the text agrees on grows with their number. A block's weights
move as soon as its gradient is known, so no more than one block's gradient exists.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from lowbit.core.compiling import MOST_SHAPES, compiled
from lowbit.core.errors import RecipeError
from lowbit.core.hardware import free_memory_on
from lowbit.core.streamed_model import StreamedModel
from lowbit.core.training import adam_scalars, follow_
from lowbit.methods.even_grid import EvenGrid, MovingCodes

_FORGET = (0.9, 0.99)
_STATE = ("position", "first", "second")
# of a weight in training: its place on the grid and Adam's two moments in float32, the code and scale it started from, and
# what one block's gradient takes, spread over the blocks
WEIGHT_BYTES = 16
# and of its training as it is saved: the first three of these, and the code that came of it
SAVED_BYTES = 13


@dataclass(frozen=True)
class Start:
    """A layer before training. weight: [out, in], what its codes stand for."""

    weight: Tensor
    grid: EvenGrid


class Codes:
    """Codes of all blocks; the scales they count do not move here."""

    def __init__(self, blocks: Iterable[Mapping[str, Start]], file: Path, *, transposed: bool) -> None:
        """blocks: by block the layers to train, by parameter name; taken one at a time. file: where an earlier run saved the
        training state, if it did. transposed: whether the model keeps its weights as [in, out]."""
        self.transposed = transposed
        self.kept = True
        self._groups = [_together(block) for block in blocks]
        self._moments = [[_zeros_of(group.codes.position) for group in groups] for groups in self._groups]
        # what changes from step to step, in one place of the device's memory: recorded kernels read it there
        places = (group.codes.position for groups in self._groups for group in groups)
        self._scalars = torch.zeros(2, device=next(places, torch.empty(0)).device)
        self._follow = follow_
        if file.exists():
            self._load(file)

    def names(self, index: int) -> set[str]:
        """The parameters of a block that are in training."""
        return {name for group in self._groups[index] for name in group.rows}

    def weights(self, index: int) -> dict[str, Tensor]:
        """Those parameters in float32, differentiable by straight-through rounding."""
        found: dict[str, Tensor] = {}
        for group in self._groups[index]:
            # split, for its gradient is one concatenation; slices would each add up a whole matrix
            parts = torch.split(group.codes.weight(), [rows.stop - rows.start for rows in group.rows.values()])
            found |= {name: part.T if self.transposed else part for name, part in zip(group.rows, parts, strict=True)}
        return found

    def positions(self, index: int) -> list[Tensor]:
        """The leaves of a block."""
        return [group.codes.position for group in self._groups[index]]

    def begin(self, step: int, rate: float) -> None:
        """What the next `descend` of every block does: step number `step`, from 1, of at most `rate` grid steps."""
        self._scalars.copy_(torch.tensor(adam_scalars(step, rate, _FORGET)))

    def compile(self) -> None:
        """Take one kernel for a step of a matrix, on a GPU, unless layers of many types make many shapes of matrices."""
        shapes = {group.codes.position.shape for groups in self._groups for group in groups}
        if len(shapes) <= MOST_SHAPES:
            self._follow = compiled(follow_)

    @torch.no_grad()
    def descend(self, index: int, gradients: Sequence[Tensor]) -> None:
        """One step of Adam for a block; gradients: of its `positions`."""
        length, correction = self._scalars
        for position, moments, gradient in zip(self.positions(index), self._moments[index], gradients, strict=True):
            self._follow(position.detach(), gradient, *moments, length, correction, _FORGET)

    def result(self, index: int, name: str) -> Tensor | None:
        """Trained codes, uint8 [out, in]; None where the start is kept."""
        found = [group for group in self._groups[index] if name in group.rows] if self.kept else []
        return found[0].codes.codes()[found[0].rows[name]] if found else None

    def moved(self) -> float:
        """The share of all codes that are others than at the start."""
        every = [group.codes for groups in self._groups for group in groups]
        changed = sum(int((one.codes() != one.start).sum()) for one in every) if self.kept else 0
        return changed / max(1, sum(one.start.numel() for one in every))

    def state(self) -> dict[str, Tensor]:
        """Everything that a continued run needs, for `Factors.save`."""
        state: dict[str, Tensor] = {}
        for index, groups in enumerate(self._groups):
            for number, group in enumerate(groups):
                parts = (group.codes.position.detach(), *self._moments[index][number])
                state |= {f"{index}.{number}.{what}": part for what, part in zip(_STATE, parts, strict=True)}
        return state

    @torch.no_grad()
    def _load(self, file: Path) -> None:
        with safe_open(file, "pt") as stored:
            for name, tensor in self.state().items():
                tensor.copy_(stored.get_tensor(name))


@dataclass(frozen=True)
class _Group:
    """Layers of a block that are trained as one matrix. rows: of each, by parameter name."""

    codes: MovingCodes
    rows: dict[str, slice]


def _together(block: Mapping[str, Start]) -> list[_Group]:
    kinds: dict[tuple[int, ...], list[str]] = {}
    for name, start in block.items():
        kinds.setdefault(start.grid.kind, []).append(name)
    groups = []
    for names in kinds.values():
        ends = list(itertools.accumulate((len(block[name].weight) for name in names), initial=0))
        rows = {name: slice(*span) for name, span in zip(names, itertools.pairwise(ends), strict=True)}
        codes = MovingCodes([block[name].weight for name in names], [block[name].grid for name in names])
        groups.append(_Group(codes, rows))
    return groups


def _zeros_of(tensor: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(tensor), torch.zeros_like(tensor)


def memory_for_codes(model: StreamedModel) -> int:
    """Bytes that the codes of all blocks take in training."""
    return WEIGHT_BYTES * sum(math.prod(parameter.shape) for parameter in model.blocks.parameters())


def check_memory(model: StreamedModel) -> None:
    """Raises RecipeError where the codes of all blocks cannot be in training at once."""
    free, need = free_memory_on(model.device), memory_for_codes(model)
    if need > 0.9 * free:
        raise RecipeError(
            f"training codes takes {need / 2**30:.1f} GiB for {need / WEIGHT_BYTES / 1e9:.2g} billion weights, and "
            f"{free / 2**30:.1f} GiB of {model.device.type} memory are free",
            hint="--no-tune-codes (scales and norms take little), or a device with more memory",
        )
