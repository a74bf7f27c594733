"""The streaming pipeline: one block in memory, written as soon as it is done, then replayed to feed the next.

    for every block:  read -> watch -> quantize -> write -> journal -> replay
Peak memory is one block plus the calibration states, whatever the model's size; a crash costs at most the block in hand.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.core.checkpoint.safetensors import SafetensorsCheckpoint
from lowbit.core.progress import Progress
from lowbit.core.streamed_model import StreamedModel
from lowbit.formats.reader import ArtifactCheckpoint, open_artifact
from lowbit.pipeline.activations import Activations
from lowbit.pipeline.block import quantize_block
from lowbit.pipeline.cache_scales import cache_scales
from lowbit.pipeline.job import BlockJob, BlockResult, place_weight
from lowbit.pipeline.journal import Journal
from lowbit.pipeline.kv_cache import scale_names
from lowbit.pipeline.learn import learn_block, learning_batch, learning_layers
from lowbit.pipeline.plan import LayerPlan, Plan
from lowbit.pipeline.writer import ShardedWriter


@dataclass(frozen=True)
class Streams:
    """How calibration states are kept: tokens computed at a time, memory that all of them may take, where to spill."""

    batch_tokens: int
    max_bytes: int
    spill: Path


@dataclass
class RunReport:
    """errors: relative output error by layer path. notes: by layer path. seconds: of this process only."""

    errors: dict[str, float] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)
    seconds: float = 0.0
    resumed_blocks: int = 0


def run(
    plan: Plan,
    model: StreamedModel,
    windows: Tensor | None,
    writer: ShardedWriter,
    journal: Journal,
    streams: Streams,
    progress: Progress,
    *,
    sequential: bool = True,
) -> RunReport:
    """Quantize the model into the writer's directory, continuing where the journal ends.

    windows: [samples, tokens] calibration tokens, None when no method needs any. Raises LowbitError subclasses.
    """
    started = time.monotonic()
    total, resumed = len(model.blocks), len(journal.blocks)
    progress.start("quantize", total)
    if 0 not in journal.blocks:
        _write_outside(plan, model, writer)
    finished = _Finished(writer.directory, plan, model)
    arriving = original = None
    if windows is not None and len(journal.blocks) < total:
        arriving, original = _embed(plan, model, windows, streams)
    for index in range(total):
        if index in journal.blocks:
            progress.note(f"{model.block_path(index)} was done before")
            _replay_finished(model, index, finished, arriving, original)
        else:
            _do_block(plan, model, index, writer, journal, arriving, original, progress, sequential)
        progress.advance()
    return _report(journal, time.monotonic() - started, resumed)


def _do_block(
    plan: Plan,
    model: StreamedModel,
    index: int,
    writer: ShardedWriter,
    journal: Journal,
    arriving: Activations | None,
    original: Activations | None,
    progress: Progress,
    sequential: bool,
) -> None:
    weights = _weights_as_stored(plan, model, index)
    path = model.block_path(index)
    with torch.no_grad(), model.block(index, weights) as module:
        job = BlockJob(
            model,
            index,
            module,
            weights,
            plan.layers,
            arriving,
            original,
            lambda layer: _scale_dtype(plan, layer),
            plan.transforms,
        )
        result = quantize_block(job, sequential=sequential, note=progress.note)
        learns = original is not None and bool(learning_layers(plan.layers))
        if learns and original is not None:
            _replay(model, index, module, original, weights)
            learn_block(job, result, original, progress.note)
        for note in {note for notes in result.notes.values() for note in notes}:
            progress.warn(f"{path}: {note}")
        _write_block(plan, writer, path, result)
        if plan.kv_cache is not None and plan.format is not None:
            names = scale_names(*plan.kv_cache, plan.format.name)
            for name, scale in zip(names, cache_scales(job, plan.kv_cache), strict=True):
                writer.write(f"{path}.{name}", scale)
        writer.sync()
        journal.done(index, {"errors": result.errors, "notes": result.notes})
        if result.errors:
            worst = max(result.errors, key=result.errors.__getitem__)
            progress.note(f"{worst} error {result.errors[worst]:.4f}")
        if index + 1 < len(model.blocks):
            _replay(model, index, module, arriving, None)
            if not learns:
                _replay(model, index, module, original, weights)


def _weights_as_stored(plan: Plan, model: StreamedModel, index: int) -> dict[str, Tensor]:
    """A block's weights; those that stay dense already rounded to the dtype they are written in, since that is what the
    blocks after this one will really be fed by."""
    path = model.block_path(index)
    weights = model.read_block(index)
    for name, tensor in weights.items():
        if f"{path}.{name.removesuffix('.weight')}" not in plan.layers:
            weights[name] = tensor.to(plan.dtype)
    return weights


def _write_block(plan: Plan, writer: ShardedWriter, path: str, result: BlockResult) -> None:
    for name, tensor in result.weights.items():
        layer = plan.layers.get(f"{path}.{name.removesuffix('.weight')}") if name.endswith(".weight") else None
        if layer is None or plan.format is None:
            writer.write(f"{path}.{name}", tensor.to(plan.dtype))
            continue
        stored = plan.format.encode(result.tensors[layer.path], layer.scheme, plan.dtype)
        for suffix, packed in stored.items():
            writer.write(f"{layer.path}.{suffix}", packed)


def _write_outside(plan: Plan, model: StreamedModel, writer: ShardedWriter) -> None:
    blocks = f"{model.architecture.blocks}."
    for name in plan.layout:
        if not name.startswith(blocks):
            writer.write(name, model.checkpoint.read(model.stored_name(name)).to(plan.dtype))


def _scale_dtype(plan: Plan, layer: LayerPlan) -> torch.dtype:
    assert plan.format is not None
    return plan.format.scale_dtype(layer.scheme, plan.dtype)


def _embed(
    plan: Plan, model: StreamedModel, windows: Tensor, streams: Streams
) -> tuple[Activations, Activations | None]:
    """Hidden states before the first block: those that the quantized prefix will feed, and the original's if compared."""
    compares = any(layer.needs.original for layer in plan.layers.values())
    batch = max(1, streams.batch_tokens // windows.shape[1])
    hidden_size = model.skeleton.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
    with torch.no_grad(), model.outside():
        arriving: Activations | None = None
        for start in range(0, len(windows), batch):
            hidden = model.embed(windows[start : start + batch])
            hidden_size = hidden.shape[-1]
            if arriving is None:
                arriving = _states((*windows.shape, hidden_size), model, batch, streams, 1 + compares)
            arriving.put(slice(start, start + len(hidden)), hidden)
        if learning_layers(plan.layers):
            model.embed(windows[: learning_batch(plan.layers, len(windows))])  # notes what blocks are called with
    assert arriving is not None
    if not compares:
        return arriving, None
    original = _states((*windows.shape, hidden_size), model, batch, streams, 2)
    original.states.copy_(arriving.states)
    return arriving, original


def calibration_states(model: StreamedModel, windows: Tensor, streams: Streams) -> Activations:
    """Room for the hidden states [windows, tokens, hidden] of all windows."""
    batch = max(1, streams.batch_tokens // windows.shape[1])
    hidden_size = model.skeleton.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
    return _states((*windows.shape, hidden_size), model, batch, streams, 1)


def _states(shape: tuple[int, ...], model: StreamedModel, batch: int, streams: Streams, copies: int) -> Activations:
    count = shape[0] * shape[1] * shape[2]
    nbytes = count * model.dtype.itemsize * copies
    spill = streams.spill if nbytes > streams.max_bytes else None
    place = model.device if spill is None else torch.device("cpu")
    return Activations((shape[0], shape[1], shape[2]), model.dtype, place, batch, spill)


def _replay(
    model: StreamedModel,
    index: int,
    module: torch.nn.Module,
    states: Activations | None,
    weights: Mapping[str, Tensor] | None,
) -> None:
    """Take the states through a block, in place; with `weights`, through the block with those instead of its own."""
    if states is None:
        return
    own = None if weights is None else {name: tensor.to(model.dtype) for name, tensor in weights.items()}
    for where in states.batches():
        states.put(where, model.run_block(index, module, states.get(where, model.device), own))


class _Finished:
    """Blocks of this artifact that an earlier run wrote, read back as it would have used them."""

    def __init__(self, directory: Path, plan: Plan, model: StreamedModel) -> None:
        self.model, self.plan = model, plan
        self.directory = directory

    def fill(self, index: int, module: torch.nn.Module) -> None:
        """Put the weights of a finished block into its module: the quantized ones, and what transforms made of others."""
        checkpoint = open_artifact(SafetensorsCheckpoint(self.directory))
        if not isinstance(checkpoint, ArtifactCheckpoint):
            return
        path = self.model.block_path(index)
        quantized = {layer.removeprefix(f"{path}.") for layer in checkpoint.modules if layer.startswith(f"{path}.")}
        for name in quantized:
            dense = checkpoint.qtensor(f"{path}.{name}").to(self.model.device).dequantize(torch.float32)
            place_weight(self.model, module, name, dense)
        others = [name for name, _ in module.named_parameters() if name.removesuffix(".weight") not in quantized]
        state = {name: checkpoint.read(f"{path}.{name}").to(self.model.device, self.model.dtype) for name in others}
        module.load_state_dict(state, strict=False, assign=True)
        module.requires_grad_(False)


def _replay_finished(
    model: StreamedModel, index: int, finished: _Finished, arriving: Activations | None, original: Activations | None
) -> None:
    if arriving is None:
        return
    weights = _weights_as_stored(finished.plan, model, index)
    with torch.no_grad(), model.block(index, weights) as module:
        _replay(model, index, module, original, weights)
        finished.fill(index, module)
        _replay(model, index, module, arriving, None)


def _report(journal: Journal, seconds: float, resumed: int) -> RunReport:
    report = RunReport(seconds=seconds, resumed_blocks=resumed)
    for index in sorted(journal.blocks):
        line: dict[str, Any] = journal.blocks[index]
        report.errors.update(line["errors"])
        report.notes.update(line["notes"])
    return report
