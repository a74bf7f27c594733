"""CUDA graphs for what a training loop does thousands of times: launching the kernels of a step takes longer than they do
where layers are small."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# fewer calls than these take longer to record than recording saves
MANY_CALLS = 16
_COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}
_ASKS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class WatchesForQuestions(TorchDispatchMode):
    """Sees whether anything within it asks the GPU for a number or a shape (experts that are picked token by token do), or
    moves something there: neither can be recorded."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch gives it no types
        self.seen = False

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [one for one in tree_leaves((args, result)) if isinstance(one, Tensor)]
        # a scalar of the CPU may be an operand, but not be copied to the GPU
        devices = {one.device.type for one in tensors if one.dim() or func in _COPIES}
        # all that is seen of torch.tensor(2.0, device=...)
        brought = func is torch.ops.aten.lift_fresh.default and not result.is_cpu
        self.seen |= len(devices) > 1 or brought or not _ASKS.isdisjoint(func.tags)
        return result


class Recorded:
    """A function of tensors on a GPU that is called again and again with the same shapes, as one CUDA graph.

    The first calls run as they are, since what is compiled or chosen in them cannot be recorded; then the kernels of a call
    are recorded, and launched at once from there on. What it gives back is overwritten by the next call.
    """

    _FIRST_CALLS = 2

    def __init__(self, function: Callable[..., tuple[Tensor, ...]]) -> None:
        self._function = function
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, ...] = ()
        self._outputs: tuple[Tensor, ...] = ()

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        self._calls += 1
        if self._calls <= self._FIRST_CALLS:
            return self._beside(inputs)
        if self._graph is None:
            self._inputs = tuple(one.clone() for one in inputs)
            self._graph = torch.cuda.CUDAGraph()
            # other threads may use the GPU meanwhile
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._outputs = self._function(*self._inputs)
        for place, one in zip(self._inputs, inputs, strict=True):
            place.copy_(one)
        self._graph.replay()
        return self._outputs

    def _beside(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """On a stream of its own, as recording will be: the backward pass remembers where it first ran."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            outputs = self._function(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        return outputs
