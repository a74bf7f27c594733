"""torch.compile for functions that a training loop calls thousands of times: a GPU then takes a few kernels for what are
dozens of operations, and most of a step's time is matrix products. Compiling takes a minute, so short loops do without."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch import Tensor

# torch._dynamo.config.recompile_limit, where nobody changed it
MOST_SHAPES = 8
_Function = TypeVar("_Function", bound=Callable[..., object])


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works for this device: a GPU with Triton, and a C compiler for what starts its kernels."""
    if device.type != "cuda":
        return False
    try:
        torch.compile(lambda values: values * 2 + 1)(torch.ones(8, device=device))
    except Exception:  # whatever is missing there, training works without, only slower
        return False
    return True


def compiled(function: _Function) -> _Function:
    """The function compiled for the shapes it is called with, of which there may be `MOST_SHAPES`: with more PyTorch runs it as
    it is, and warns. Numbers among its arguments must not change between calls."""
    return cast(_Function, torch.compile(function, dynamic=False))


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
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch gives it no types
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            outputs = self._function(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        return outputs
