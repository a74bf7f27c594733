"""The hidden states of the calibration windows on their way through the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lowbit.core.distributed import ALONE, World
from lowbit.core.streamed_model import StreamedModel
from lowbit.pipeline.activations import Activations
from lowbit.pipeline.learn import learning_batch, learning_layers
from lowbit.pipeline.plan import Plan


@dataclass(frozen=True)
class Streams:
    """How calibration states are kept: tokens computed at a time, memory that all of them may take, where to spill."""

    batch_tokens: int
    max_bytes: int
    spill: Path


def embed(
    plan: Plan, model: StreamedModel, windows: Tensor, streams: Streams, world: World = ALONE
) -> tuple[Activations, Activations | None]:
    """Hidden states before the first block, of this process's share of the windows [samples, tokens]: those that the
    quantized prefix will feed, and the original's if a method compares."""
    compares = any(layer.needs.original for layer in plan.layers.values())
    share = world.share(len(windows))
    own = windows[share]
    arriving: Activations | None = None
    with torch.no_grad(), model.outside(head=False):
        for ids in torch.split(own, _batch(windows, streams)):
            hidden = model.embed(ids)
            if arriving is None:
                arriving = room_for(model, windows, streams, share, hidden.shape[-1], copies=1 + compares)
                batches = arriving.batches()
            arriving.put(next(batches), hidden)
        if learning_layers(plan.layers):
            model.embed(windows[: learning_batch(plan.layers, len(windows))])  # notes what blocks are called with
    assert arriving is not None
    if not compares:
        return arriving, None
    original = room_for(model, windows, streams, share, arriving.states.shape[-1], copies=2)
    original.states.copy_(arriving.states)
    return arriving, original


def calibration_states(model: StreamedModel, windows: Tensor, streams: Streams) -> Activations:
    """Room for the hidden states [windows, tokens, hidden] of all windows."""
    hidden = int(model.skeleton.get_input_embeddings().weight.shape[1])
    return room_for(model, windows, streams, slice(0, len(windows)), hidden, copies=1)


def replay(
    model: StreamedModel,
    index: int,
    module: nn.Module,
    states: Activations | None,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Take the states through a block, in place; with `weights`, through the block with those instead of its own."""
    if states is None:
        return
    own = None if weights is None else {name: tensor.to(model.dtype) for name, tensor in weights.items()}
    for where in states.batches():
        states.put(where, model.run_block(index, module, states.get(where, model.device), own))


def _batch(windows: Tensor, streams: Streams) -> int:
    return max(1, streams.batch_tokens // windows.shape[1])


def room_for(
    model: StreamedModel, windows: Tensor, streams: Streams, share: slice, hidden: int, copies: int
) -> Activations:
    """Room for the states [share, tokens, hidden] of a share of the windows, spilled to disk when `copies` of it are more
    than memory may hold."""
    shape = (share.stop - share.start, windows.shape[1], hidden)
    nbytes = shape[0] * shape[1] * shape[2] * model.dtype.itemsize * copies
    spill = streams.spill if nbytes > streams.max_bytes else None
    place = model.device if spill is None else torch.device("cpu")
    batch = _batch(windows, streams)
    # each of several processes keeps as much as one alone would, as long as that is memory that states may take
    room = min(nbytes // copies // shape[0] * len(windows), streams.max_bytes - nbytes)
    return Activations(shape, model.dtype, place, batch, spill, first=share.start, total=len(windows), room=room)
