"""A last pass over the whole artifact: scales and norms are trained until its next-token distribution is the base's.

Codes stay. What is trained is small (one factor for each scale, one for each weight of a block's norms), so a few dozen
steps on little text do not overfit, and what one block gets wrong another can make up for, which no layer-wise method
sees. The loss is the KL divergence of the base's distribution from the artifact's, as verification measures it;
end-to-end training of quantization scales is EfficientQAT's second phase (Chen et al. 2024), there on the text itself.

Memory is bounded as in the rest of the pipeline: blocks are run one at a time, forward without a graph and then backward
block by block from kept inputs, so no more than one block's graph exists.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.core.progress import Progress
from lowbit.core.streamed_model import StreamedModel
from lowbit.core.training import mixed_precision, reproducible
from lowbit.pipeline.activations import Activations
from lowbit.pipeline.factors import Factors

# tokens whose logits are compared at a time: a vocabulary of 128k takes half a MiB for each
_LOGITS_TOKENS = 1024
_WARM_UP = 5
# steps between two saves of the training state
_SAVE_EVERY = 16
# how much of what was learned is tried on held-out windows: the less there is to gain, the sooner training goes too far
_SHARES = (1.0, 0.5, 0.25)


@dataclass(frozen=True)
class TuneOptions:
    """steps: gradient steps. rate: the largest step, as a share of a scale. batch: windows a step, and windows held out."""

    steps: int = 64
    rate: float = 3e-3
    batch: int = 8
    seed: int = 0


@dataclass(frozen=True)
class Tuned:
    """KL on held-out windows before and after."""

    before: float
    after: float


def tune(
    base: StreamedModel,
    artifact: StreamedModel,
    factors: Factors,
    teacher: Activations,
    windows: Tensor,
    options: TuneOptions,
    progress: Progress,
) -> Tuned:
    """Train `factors` in place, and keep that share of what they learned that serves held-out windows best; they are all
    zero afterwards when those did not gain.

    artifact: its blocks read as dense weights. teacher: the base's states after its last block for all windows.
    windows: [samples, tokens] int64.
    """
    batch = max(1, min(options.batch, len(windows) // 4))
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(options.seed))
    held_out, training = order[:batch], order[batch:]
    progress.start("tune", options.steps)
    with reproducible(), base.outside(), artifact.outside():
        student = _Student(base, artifact, factors)
        reached = factors.values.clone()  # by an earlier run
        factors.values.zero_()
        before = student.loss(windows[held_out], teacher.states[held_out.to(teacher.states.device)])
        factors.values.copy_(reached)
        for step in range(factors.step, options.steps):
            chosen = _batch(training, batch, step, options.seed)
            loss = student.gradients(windows[chosen], teacher.states[chosen.to(teacher.states.device)])
            factors.descend(options.rate * _schedule(step, options.steps))
            progress.note(f"KL {loss:.4f}")
            progress.advance()
            if factors.step % _SAVE_EVERY == 0:
                factors.save()
        after = _keep_best_share(
            factors.values,
            lambda: student.loss(windows[held_out], teacher.states[held_out.to(teacher.states.device)]),
        )
    if not after < before:
        factors.values.zero_()
        progress.warn(
            f"tuning scales did not help on held-out windows (KL {before:.4g} -> {after:.4g}): kept the start"
        )
    return Tuned(before, min(before, after))


def _keep_best_share(trained: Tensor, loss: Callable[[], float]) -> float:
    """Multiply `trained` by the share with the least loss, which is returned."""
    whole, found = trained.clone(), {}
    for share in _SHARES:
        trained.copy_(whole).mul_(share)
        found[share] = loss()
    best = min(found, key=found.__getitem__)
    trained.copy_(whole).mul_(best)
    return found[best]


def last_states(base: StreamedModel, windows: Tensor, states: Activations, progress: Progress) -> None:
    """Fill `states` with the base's hidden states after its last block."""
    progress.start("base", len(base.blocks))
    with torch.no_grad():
        with base.outside():
            for where in states.batches():
                states.put(where, base.embed(windows[where]))
        for index in range(len(base.blocks)):
            with base.block(index) as block:
                for where in states.batches():
                    states.put(where, base.run_block(index, block, states.get(where, base.device)))
            progress.advance()


def _batch(training: Tensor, size: int, step: int, seed: int) -> Tensor:
    """Windows of a step: every epoch is a shuffle of its own, so that a continued run sees the same ones."""
    steps = max(1, len(training) // size)
    generator = torch.Generator().manual_seed(seed + 1 + step // steps)
    start = step % steps * size
    return training[torch.randperm(len(training), generator=generator)[start : start + size]]


def _schedule(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))


class _Student:
    """The artifact with its factors, run block by block."""

    def __init__(self, base: StreamedModel, artifact: StreamedModel, factors: Factors) -> None:
        self.base, self.artifact, self.factors = base, artifact, factors
        self._kept: dict[int, dict[str, Tensor]] = {}

    @torch.no_grad()
    def loss(self, windows: Tensor, teacher: Tensor) -> float:
        """Mean KL over all tokens."""
        hidden, _ = self._forward(windows)
        return sum(self._divergence(*pair).item() for pair in _pieces(hidden, teacher)) / windows.numel()

    def gradients(self, windows: Tensor, teacher: Tensor) -> float:
        """Mean KL; its gradient goes to the factors."""
        with torch.no_grad():
            hidden, inputs = self._forward(windows)
        total, gradient = 0.0, torch.empty_like(hidden)
        for (piece, target), place in zip(_pieces(hidden, teacher), _pieces(gradient), strict=True):
            leaf = piece.detach().requires_grad_()
            with torch.enable_grad():
                loss = self._divergence(leaf, target) / windows.numel()
                place[0].copy_(torch.autograd.grad(loss, leaf)[0])
            total += loss.item()
        for index in reversed(range(len(inputs))):
            gradient = self._backward(index, inputs[index], gradient)
        return total

    def _forward(self, windows: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(states after the last block float32, the inputs of every block in 16 bits)."""
        hidden = self.artifact.embed(windows).float()
        inputs = []
        for index in range(len(self.artifact.blocks)):
            inputs.append(hidden.to(torch.bfloat16))
            hidden = self._run(index, hidden, self.factors.block(index))
        return hidden, inputs

    def _backward(self, index: int, inputs: Tensor, gradient: Tensor) -> Tensor:
        """The gradient with respect to a block's inputs; that of its factors is kept with them."""
        hidden = inputs.float().requires_grad_()
        leaves = {name: factor.detach().requires_grad_() for name, factor in self.factors.block(index).items()}
        with torch.enable_grad():
            output = self._run(index, hidden, leaves)
            found = torch.autograd.grad(output, [hidden, *leaves.values()], gradient)
        for name, own in zip(leaves, found[1:], strict=True):
            self.factors.add_gradient(index, name, own)
        return found[0]

    def _run(self, index: int, hidden: Tensor, factors: Mapping[str, Tensor]) -> Tensor:
        weights = {
            name: self.factors.apply(index, name, weight, factors) for name, weight in self._weights(index).items()
        }
        with mixed_precision(hidden.device):
            return self.artifact.run_block(index, self.artifact.blocks[index], hidden, weights).float()

    def _weights(self, index: int) -> dict[str, Tensor]:
        """The block's dense weights in 16 bits; kept once read, as long as there is room."""
        if index in self._kept:
            return self._kept[index]
        weights = {name: weight.to(self.base.dtype) for name, weight in self.artifact.read_block(index).items()}
        size = sum(weight.nbytes for weight in weights.values())
        if size * len(self.base.blocks) < _free(self.base.device) + size * len(self._kept):
            self._kept[index] = weights
        return weights

    def _divergence(self, hidden: Tensor, teacher: Tensor) -> Tensor:
        """KL summed over the tokens of [1, tokens, hidden] states after the last block."""
        with mixed_precision(hidden.device):
            with torch.no_grad():
                wanted = self.base.logits(teacher.to(hidden.device)).float().log_softmax(-1)
            given = self.artifact.logits(hidden).float().log_softmax(-1)
        return (wanted.exp() * (wanted - given)).sum()


def _pieces(*states: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same few tokens of several [windows, tokens, hidden], one window at a time."""
    for window in range(len(states[0])):
        for start in range(0, states[0].shape[1], _LOGITS_TOKENS):
            yield tuple(one[window : window + 1, start : start + _LOGITS_TOKENS] for one in states)


def _free(device: torch.device) -> int:
    """Bytes of memory that weights may take: half of what is free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    import psutil

    return int(psutil.virtual_memory().available) // 2
