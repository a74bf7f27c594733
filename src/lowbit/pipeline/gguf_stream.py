"""Calibration text on its way through a model whose weights are being turned into GGUF tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn

from lowbit.core.statistics import InputStatistics
from lowbit.core.streamed_model import StreamedModel
from lowbit.pipeline.activations import Activations
from lowbit.pipeline.streams import Streams, room_for

Visit = Callable[[str, Tensor], None]  # (module's name in the block, its inputs [batch, tokens, in])


def embedded(
    model: StreamedModel, windows: Tensor, streams: Streams, embedding: Tensor | None = None, copies: int = 1
) -> Activations:
    """Hidden states before the first block, of token windows [samples, tokens]; with `embedding` [vocabulary, hidden] in
    place of the model's own. copies: how many streams of states there will be, to share the memory."""
    batch = max(1, streams.batch_tokens // windows.shape[1])
    states: Activations | None = None
    with torch.no_grad(), model.outside():
        if embedding is not None:
            table = model.skeleton.get_input_embeddings()
            table.weight = nn.Parameter(embedding.to(model.device, model.dtype), requires_grad=False)
        for start in range(0, len(windows), batch):
            hidden = model.embed(windows[start : start + batch])
            if states is None:
                states = room_for(model, windows, streams, slice(0, len(windows)), hidden.shape[-1], copies)
            states.put(slice(start, start + len(hidden)), hidden)
    assert states is not None
    return states


def advance(
    model: StreamedModel,
    index: int,
    module: nn.Module,
    states: Activations,
    visit: Visit | None = None,
    names: Sequence[str] = (),
) -> None:
    """Take the states through a block, in place. `visit` is told the inputs of the named modules on the way."""
    with torch.no_grad():
        for where in states.batches():
            seen: dict[str, Tensor] = {}
            with _watched(module, names, seen, leave=False):
                hidden = model.run_block(index, module, states.get(where, model.device))
            states.put(where, hidden)
            for name, inputs in seen.items():
                if visit is not None:
                    visit(name, inputs)


def statistics_of(
    model: StreamedModel,
    index: int,
    module: nn.Module,
    name: str,
    states: Activations,
) -> InputStatistics:
    """Gram matrix and the like of the inputs of one module of the block; the block is left when it is reached."""
    statistics: InputStatistics | None = None
    with torch.no_grad():
        for where in states.batches():
            inputs = _inputs(model, index, module, name, states.get(where, model.device))
            if statistics is None:
                statistics = InputStatistics(inputs.shape[-1], model.device)
            statistics.add(inputs)
    assert statistics is not None
    statistics.finish()
    return statistics


def grams_of(
    model: StreamedModel, index: int, module: nn.Module, names: Sequence[str], states: Activations
) -> dict[str, Tensor]:
    """Gram matrices of the inputs of several modules of the block, by name; takes the states through it, in place."""
    found: dict[str, InputStatistics] = {}

    def visit(name: str, inputs: Tensor) -> None:
        if name not in found:
            found[name] = InputStatistics(inputs.shape[-1], model.device, sizes=False)
        found[name].add(inputs)

    advance(model, index, module, states, visit, names)
    grams = {}
    for name, statistics in found.items():
        statistics.finish()
        assert statistics.gram is not None
        grams[name] = statistics.gram
    return grams


def head_statistics(model: StreamedModel, states: Activations, original: Activations | None = None) -> InputStatistics:
    """Gram matrix of the inputs of the output head, from the last block's outputs; `original` are the unquantized
    model's, to compare with."""
    statistics: InputStatistics | None = None
    with torch.no_grad(), model.outside():
        for where in states.batches():
            inputs = _head_inputs(model, states.get(where, model.device))
            compared = None if original is None else _head_inputs(model, original.get(where, model.device))
            if statistics is None:
                statistics = InputStatistics(inputs.shape[-1], model.device, cross=original is not None)
            statistics.add(inputs, compared)
    assert statistics is not None
    statistics.finish()
    return statistics


def _head_inputs(model: StreamedModel, hidden: Tensor) -> Tensor:
    head: nn.Module = model.skeleton.get_output_embeddings()
    seen: dict[str, Tensor] = {}
    with _watched(head, [""], seen, leave=True), suppress(_Seen):
        model.logits(hidden)
    return seen[""]


class _Seen(Exception):  # noqa: N818 - control flow, not an error
    """The watched layer has been reached."""


def _inputs(model: StreamedModel, index: int, module: nn.Module, name: str, hidden: Tensor) -> Tensor:
    seen: dict[str, Tensor] = {}
    with _watched(module, [name], seen, leave=True), suppress(_Seen):
        model.run_block(index, module, hidden)
    return seen[name]


@contextmanager
def _watched(module: nn.Module, names: Sequence[str], seen: dict[str, Tensor], *, leave: bool) -> Iterator[None]:
    """While it lasts, a run of the block puts the inputs of the named modules into `seen`; `leave` ends it there."""

    def hook_of(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name] = args[0]
            if leave:
                raise _Seen

        return hook

    handles = [module.get_submodule(name).register_forward_pre_hook(hook_of(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
