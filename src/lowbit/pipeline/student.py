"""The artifact in training, run block by block: forward without a graph, then backward from kept inputs, so that no more
than one block's graph exists."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lowbit.core.compiling import compiled
from lowbit.core.hardware import free_memory_on
from lowbit.core.recording import Recorded, WatchesForQuestions
from lowbit.core.streamed_model import BlockArguments, StreamedModel, run_module
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
        self._recording = self._compiling = False
        self._run_module, self._divergence_of = run_module, _divergence
        self._stand_ins: dict[int, nn.Module] = {}
        self._held: list[BlockArguments] = []
        self._forward: Callable[..., tuple[Tensor, ...]] = self._through
        self._backward: Callable[..., tuple[Tensor, ...]] = self._back

    def record(self, *, compiling: bool = False) -> None:
        """Take the way forward and back as CUDA graphs from here on, for windows of one shape: launching the thousands of
        kernels of a step takes three times as long as they do. Only where `can_record`.

        compiling: make fewer kernels of them first, which takes as long as a hundred steps or two.
        """
        self._recording, self._compiling = True, compiling
        if compiling:
            self._run_module, self._divergence_of = compiled(run_module), compiled(_divergence)
            if self.codes:
                self.codes.compile()
        self._forward, self._backward = Recorded(self._through), Recorded(self._back)

    @torch.no_grad()
    def can_record(self, windows: Tensor) -> bool:
        """Whether steps are the same kernels for all windows, and what they read has room on the GPU; runs these windows."""
        if self.base.device.type != "cuda":
            return False
        hidden = self._embedded(windows)
        for index in range(len(self.artifact.blocks)):
            weights = self._changed(index, self.factors.block(index))
            if index not in self._kept:
                return False
            with WatchesForQuestions() as watch:
                hidden = self._run_with(index, weights, hidden)
            if watch.seen:
                return False
        return True

    @torch.no_grad()
    def loss(self, windows: Tensor, teacher: Tensor) -> float:
        """Mean KL over all tokens."""
        hidden = self._through(self._embedded(windows))[0]
        return sum(self._divergence(*pair).item() for pair in self._pieces(hidden, teacher)) / windows.numel()

    def gradients(self, windows: Tensor, teacher: Tensor) -> Tensor:
        """Mean KL, a scalar; its gradient goes to the factors, and to the codes, which descend at once."""
        hidden, *inputs = self._forward(self._embedded(windows))
        losses, gradient = [], torch.empty_like(hidden)
        for (piece, target), place in zip(self._pieces(hidden, teacher), self._pieces(gradient), strict=True):
            leaf = piece.detach().requires_grad_()
            with torch.enable_grad():
                loss = self._divergence(leaf, target) / windows.numel()
                place[0].copy_(torch.autograd.grad(loss, leaf)[0])
            losses.append(loss.detach())
        self._backward(gradient, *inputs)
        return torch.stack(losses).sum()

    @torch.no_grad()
    def _embedded(self, windows: Tensor) -> Tensor:
        with mixed_precision(self.artifact.device):
            hidden = self.artifact.embed(windows).float()
        if self._recording:
            self._hold([self.artifact.arguments(index, hidden) for index in range(len(self.artifact.blocks))])
        return hidden

    def _hold(self, arguments: list[BlockArguments]) -> None:
        """Put what blocks are called with where it was for the first windows: recorded kernels look for it there. All windows
        of a pass have one shape."""
        if not self._held:
            places: dict[int, Any] = {}  # blocks share masks and position embeddings
            self._held = tree_map_only(Tensor, lambda one: places.setdefault(id(one), one.clone()), arguments)
        pairs = zip(tree_leaves(self._held), tree_leaves(arguments), strict=True)
        tensors = {id(place): (place, value) for place, value in pairs if isinstance(place, Tensor)}
        for place, value in tensors.values():
            place.copy_(value)

    @torch.no_grad()
    def _through(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """(states after the last block float32, the inputs of every block in 16 bits)."""
        inputs = []
        for index in range(len(self.artifact.blocks)):
            inputs.append(hidden.to(torch.bfloat16))
            hidden = self._run(index, hidden, self.factors.block(index))
        return hidden, *inputs

    def _back(self, gradient: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        """From the gradient of the last block's output, through all blocks, to the first one's input."""
        for index in reversed(range(len(inputs))):
            gradient = self._back_through(index, inputs[index], gradient)
        return (gradient,)

    def _back_through(self, index: int, inputs: Tensor, gradient: Tensor) -> Tensor:
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
        return self._run_with(index, self._changed(index, factors), hidden)

    def _changed(self, index: int, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The block's parameters in float32 under these factors."""
        weights = dict(self._weights(index))
        if self.codes:
            weights |= self.codes.weights(index)
        # in one order whatever the layers' types are: blocks that are compiled for one order of names are not for another
        names = [name for name, _ in self.artifact.blocks[index].named_parameters()]
        return {name: self.factors.apply(index, name, weights[name], factors) for name in names}

    def _run_with(self, index: int, weights: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        args, kwargs = self._held[index] if self._recording else self.artifact.arguments(index, hidden)
        with mixed_precision(hidden.device):
            if self._compiling and index not in self._stand_ins:
                self._stand_ins[index] = self._stand_in(index, weights, hidden, args, kwargs)
            block = self._stand_ins.get(index, self.artifact.blocks[index])
            return self._run_module(block, weights, hidden, args, kwargs).float()

    @torch.no_grad()
    def _stand_in(
        self,
        index: int,
        weights: Mapping[str, Tensor],
        hidden: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> nn.Module:
        """An earlier block that with this one's weights gives the same, bit for bit: compiled once, it serves for both."""
        own = self.artifact.blocks[index]
        shapes = {name: parameter.shape for name, parameter in own.named_parameters()}
        expected = run_module(own, weights, hidden, args, kwargs)
        for other in {id(block): block for block in self._stand_ins.values()}.values():
            alike = shapes == {name: parameter.shape for name, parameter in other.named_parameters()}
            if alike and torch.equal(run_module(other, weights, hidden, args, kwargs), expected):
                return other
        return own

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
                wanted = self.base.logits(teacher.to(hidden.device))
            return self._divergence_of(wanted, self.artifact.logits(hidden))

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


def _divergence(wanted: Tensor, given: Tensor) -> Tensor:
    """KL of two distributions, [..., vocabulary] logits, summed over all but the last dimension in float32."""
    wanted, given = wanted.float().log_softmax(-1), given.float().log_softmax(-1)
    return (wanted.exp() * (wanted - given)).sum()
