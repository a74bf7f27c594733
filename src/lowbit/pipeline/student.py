"""The artifact in training, run block by block: forward without a graph, then backward from kept inputs, so that no more
than one block's graph exists."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lowbit.core.hardware import free_memory_on
from lowbit.core.streamed_model import StreamedModel
from lowbit.core.training import mixed_precision
from lowbit.pipeline.codes import Codes
from lowbit.pipeline.factors import Factors

# logits in float32 that are compared at a time; of one window no more tokens than these on a CPU
_LOGITS_BYTES, _LOGITS_TOKENS = 2**30, 1024


class Student:
    """The artifact under its factors and, when codes are given, with those instead of the ones it has stored."""

    def __init__(
        self, base: StreamedModel, artifact: StreamedModel, factors: Factors, codes: Codes | None = None
    ) -> None:
        self.base, self.artifact, self.factors, self.codes = base, artifact, factors, codes
        self._kept: dict[int, dict[str, Tensor]] = {}

    @torch.no_grad()
    def loss(self, windows: Tensor, teacher: Tensor) -> float:
        """Mean KL over all tokens."""
        hidden, _ = self._forward(windows)
        return sum(self._divergence(*pair).item() for pair in self._pieces(hidden, teacher)) / windows.numel()

    def gradients(self, windows: Tensor, teacher: Tensor) -> float:
        """Mean KL; its gradient goes to the factors, and to the codes, which descend at once."""
        with torch.no_grad():
            hidden, inputs = self._forward(windows)
        losses, gradient = [], torch.empty_like(hidden)
        for (piece, target), place in zip(self._pieces(hidden, teacher), self._pieces(gradient), strict=True):
            leaf = piece.detach().requires_grad_()
            with torch.enable_grad():
                loss = self._divergence(leaf, target) / windows.numel()
                place[0].copy_(torch.autograd.grad(loss, leaf)[0])
            losses.append(loss.detach())
        for index in reversed(range(len(inputs))):
            gradient = self._backward(index, inputs[index], gradient)
        return float(torch.stack(losses).sum())

    def _forward(self, windows: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(states after the last block float32, the inputs of every block in 16 bits)."""
        with mixed_precision(self.artifact.device):
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
        positions = self.codes.positions(index) if self.codes else []
        with torch.enable_grad():
            output = self._run(index, hidden, leaves)
            found = torch.autograd.grad(output, [hidden, *leaves.values(), *positions], gradient)
        for name, own in zip(leaves, found[1:], strict=False):
            self.factors.add_gradient(index, name, own)
        if self.codes:
            self.codes.descend(index, found[1 + len(leaves) :])
        return found[0]

    def _run(self, index: int, hidden: Tensor, factors: Mapping[str, Tensor]) -> Tensor:
        weights = dict(self._weights(index))
        if self.codes:
            weights |= self.codes.weights(index)
        changed = {name: self.factors.apply(index, name, weight, factors) for name, weight in weights.items()}
        with mixed_precision(hidden.device):
            return self.artifact.run_block(index, self.artifact.blocks[index], hidden, changed).float()

    def _weights(self, index: int) -> dict[str, Tensor]:
        """The block's dense weights in 16 bits, without those that codes stand for; kept once read, as long as there is
        room."""
        if index in self._kept:
            return self._kept[index]
        coded = self.codes.names(index) if self.codes else set()
        stored = self.artifact.read_block(index)
        weights = {name: weight.to(self.base.dtype) for name, weight in stored.items() if name not in coded}
        size = sum(weight.nbytes for weight in weights.values())
        if size * len(self.base.blocks) < free_memory_on(self.base.device) // 2 + size * len(self._kept):
            self._kept[index] = weights
        return weights

    def _divergence(self, hidden: Tensor, teacher: Tensor) -> Tensor:
        """KL summed over the tokens of [windows, tokens, hidden] states after the last block."""
        with mixed_precision(hidden.device):
            with torch.no_grad():
                wanted = self.base.logits(teacher.to(hidden.device)).float().log_softmax(-1)
            given = self.artifact.logits(hidden).float().log_softmax(-1)
        return (wanted.exp() * (wanted - given)).sum()

    def _pieces(self, *states: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """The same tokens of several [windows, tokens, hidden]: on a GPU as many windows as there is room for, on a CPU a part
        of one."""
        count, tokens = states[0].shape[:2]
        vocabulary = self.base.skeleton.get_output_embeddings().weight.shape[0]
        together = _LOGITS_BYTES // (4 * vocabulary * tokens) if self.base.device.type == "cuda" else 0
        step = _LOGITS_TOKENS if together == 0 else tokens
        for window in range(0, count, max(1, together)):
            for start in range(0, tokens, step):
                yield tuple(one[window : window + max(1, together), start : start + step] for one in states)
