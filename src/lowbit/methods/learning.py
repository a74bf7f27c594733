"""Learned rounding: the codes and scales of a whole block are trained so that the block's output stays what it was.

Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs" (AutoRound), 2023: signed
gradient steps on where each weight rounds to and on its group's range, through straight-through rounding. What differs:
- training starts from another method's solution (GPTQ) instead of round-to-nearest, and a block that did not get better
  on held-out windows keeps that start;
- the target is the original block on the original inputs, so the block also makes up for the blocks before it;
- tokens whose states are hundreds of times larger than the rest (attention sinks) do not drown the loss: every token's
  error is weighed against what the block itself adds to it.
How the weights of a format follow from what is trained is a `Learnable`'s own: learned_matrix.py, learned_blocks.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from lowbit.core.recording import MANY_CALLS, Recorded, WatchesForQuestions


class Quantized(Protocol):
    """A quantized matrix [out, in]."""

    def dequantize(self) -> Tensor:
        """[out, in] float32."""
        ...


Result = TypeVar("Result", bound=Quantized)
_Result_co = TypeVar("_Result_co", bound=Quantized, covariant=True)


class Learnable(Protocol[_Result_co]):
    """One linear layer in training."""

    @property
    def start(self) -> _Result_co:
        """What training starts from."""
        ...

    @property
    def position(self) -> Tensor:
        """[out, in] float32, a leaf: where each weight stands on the sorted values of its grid, in units of one step."""
        ...

    @property
    def stretches(self) -> Sequence[Tensor]:
        """Leaves: float scales (and minimums) as multiples of those of the start."""
        ...

    def weight(self) -> Tensor:
        """[out, in] float32: the dequantized weight, differentiable by straight-through rounding."""
        ...

    def result(self) -> _Result_co:
        """The trained numbers: what `weight` stands for, exactly."""
        ...


@dataclass(frozen=True)
class LearnOptions:
    """steps: gradient steps a block. batch: windows a step, and windows held out. reach: how far, in steps of the grid, a
    weight can travel in all. scale_reach: likewise a scale, as a share of itself. seed: which windows when."""

    steps: int = 100
    batch: int = 8
    reach: float = 0.5
    scale_reach: float = 0.1
    seed: int = 0

    def batch_of(self, windows: int) -> int:
        """Windows of one gradient step: at most a quarter of what there is."""
        return max(1, min(self.batch, windows // 4))


@dataclass(frozen=True)
class Learned(Generic[Result]):
    """The better of start and end by layer, and the loss on held-out windows before and after."""

    tensors: dict[str, Result]
    before: float
    after: float

    @property
    def kept_start(self) -> bool:
        """Whether training did not help."""
        return not self.after < self.before


def learn(
    matrices: Mapping[str, Learnable[Result]],
    run: Callable[[Mapping[str, Tensor], Tensor], Tensor],
    inputs: Callable[[Tensor], Tensor],
    targets: Callable[[Tensor], Tensor],
    windows: int,
    options: LearnOptions,
) -> Learned[Result]:
    """Train the matrices of one block.

    run(weights [out, in] by layer, hidden) -> the block's output. inputs, targets: window indices -> hidden states
    [batch, tokens, hidden]. A batch of windows is held out.
    """
    generator = torch.Generator().manual_seed(options.seed)
    order = torch.randperm(windows, generator=generator)
    batch, steps = options.batch_of(windows), options.steps
    held_out, training = order[:batch], order[batch:]

    def held_out_loss(tensors: Mapping[str, Result], watched: AbstractContextManager[object]) -> float:
        with torch.no_grad():
            hidden, weights = inputs(held_out), {name: tensor.dequantize() for name, tensor in tensors.items()}
            with watched:
                output = run(weights, hidden)
            return _loss(output, hidden, targets(held_out)).item()

    start = {name: matrix.start for name, matrix in matrices.items()}
    watch = WatchesForQuestions()
    before = held_out_loss(start, watch)
    # how far positions and stretches go in the next step, in one place of the device's memory: recorded kernels read it there
    every = _lengths(options).to(next(iter(matrices.values())).position.device)
    lengths = torch.zeros(2, device=every.device)
    descend = _descent(matrices, run, lengths)
    descend = Recorded(descend) if every.is_cuda and not watch.seen and steps >= MANY_CALLS else descend
    for step in range(steps):
        chosen = training[torch.randint(len(training), (batch,), generator=generator)]
        lengths.copy_(every[step])
        descend(inputs(chosen), targets(chosen))
    del descend  # what is recorded keeps a whole step's memory
    trained = {name: matrix.result() for name, matrix in matrices.items()}
    after = held_out_loss(trained, nullcontext())
    return Learned(trained if after < before else start, before, after)


def _lengths(options: LearnOptions) -> Tensor:
    """[steps, 2] float32: of each step, for positions and for stretches. Linear decay; together they travel the reach."""
    rate = 2 * (1 - torch.arange(options.steps, dtype=torch.float64) / options.steps) / options.steps
    return (rate[:, None] * torch.tensor([options.reach, options.scale_reach], dtype=torch.float64)).float()


def _descent(
    matrices: Mapping[str, Learnable[Result]],
    run: Callable[[Mapping[str, Tensor], Tensor], Tensor],
    lengths: Tensor,
) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
    """(hidden, target) -> one signed gradient step in place, of `lengths` [2]."""
    positions = [matrix.position for matrix in matrices.values()]
    stretches = [stretch for matrix in matrices.values() for stretch in matrix.stretches]

    def descend(hidden: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            loss = _loss(run({name: one.weight() for name, one in matrices.items()}, hidden), hidden, target)
            gradients = torch.autograd.grad(loss, positions + stretches)
        with torch.no_grad():
            for position, gradient in zip(positions, gradients, strict=False):
                position.sub_(gradient.sign_().mul_(lengths[0]))
            for stretch, gradient in zip(stretches, gradients[len(positions) :], strict=True):
                stretch.sub_(gradient.sign_().mul_(lengths[1]))
        return ()

    return descend


def _loss(output: Tensor, hidden: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of the squared error, relative to what the block adds to the token, or typically adds."""
    error = (output.float() - target.float()).square().mean(-1)
    power = (target.float() - hidden.float()).square().mean(-1)
    return (error / power.clamp_min(power.median())).mean()
