"""The streaming pipeline: one block in memory, written as soon as it is done, then replayed to feed the next.

    for every block:  read -> watch -> quantize -> write -> journal -> replay
Peak memory is one block plus the calibration states, whatever the model's size; a crash costs at most the block in hand,
and one that was still being written. Several processes share the windows and the rows of the matrices.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from lowbit.core.checkpoint.safetensors import SafetensorsCheckpoint
from lowbit.core.distributed import ALONE, World
from lowbit.core.progress import Progress
from lowbit.core.streamed_model import StreamedModel
from lowbit.formats.reader import ArtifactCheckpoint, open_artifact
from lowbit.pipeline.activations import Activations
from lowbit.pipeline.block import quantize_block
from lowbit.pipeline.cache_scales import cache_scales
from lowbit.pipeline.job import BlockJob, BlockResult, place_weight
from lowbit.pipeline.kv_cache import scale_names
from lowbit.pipeline.learn import learn_block, learning_layers
from lowbit.pipeline.output import Output
from lowbit.pipeline.passage import BEHIND, HalvesFinder, Passage
from lowbit.pipeline.plan import Plan
from lowbit.pipeline.streams import Streams as Streams
from lowbit.pipeline.streams import calibration_states as calibration_states
from lowbit.pipeline.streams import embed, replay


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
    output: Output,
    streams: Streams,
    progress: Progress,
    *,
    sequential: bool = True,
    world: World = ALONE,
) -> RunReport:
    """Quantize the model into `output`, continuing where an earlier run ended.

    windows: [samples, tokens] calibration tokens, None when no method needs any. Raises LowbitError subclasses.
    """
    started = time.monotonic()
    done = dict(output.blocks)
    progress.start("quantize", len(model.blocks))
    if 0 not in done:
        output.outside(lambda: _outside(plan, model))
    arriving = original = None
    if windows is not None and len(done) < len(model.blocks):
        arriving, original = embed(plan, model, windows, streams, world)
    blocks = _Blocks(plan, model, output, arriving, original, progress, sequential, world)
    for index in range(len(model.blocks)):
        if index in done:
            progress.note(f"{model.block_path(index)} was done before")
            blocks.replay_finished(index)
        else:
            blocks.quantize(index)
        progress.advance()
    output.wait()
    report = RunReport(seconds=time.monotonic() - started, resumed_blocks=len(done))
    for index in sorted(output.blocks):
        report.errors.update(output.blocks[index]["errors"])
        report.notes.update(output.blocks[index]["notes"])
    return report


@dataclass
class _Blocks:
    """What every block is done with, and the states that stand before the block in hand."""

    plan: Plan
    model: StreamedModel
    output: Output
    arriving: Activations | None
    original: Activations | None
    progress: Progress
    sequential: bool
    world: World
    halves: HalvesFinder = field(default_factory=HalvesFinder)

    def quantize(self, index: int) -> None:
        """Quantize a block, hand it to the output, and take the states through it."""
        plan, model = self.plan, self.model
        weights = _weights_as_stored(plan, model, index)
        path = model.block_path(index)
        with torch.no_grad(), model.block(index, weights) as module:
            job = BlockJob(
                model,
                index,
                module,
                weights,
                plan.layers,
                self._passage(index, module, self.arriving),
                self._passage(index, module, self.original, weights),
                plan.scale_dtype,
                plan.transforms,
                self.world,
            )
            result = quantize_block(job, sequential=self.sequential, note=self.progress.note)
            if job.original is not None and learning_layers(plan.layers):
                job.original.advance(BEHIND)
                learn_block(job, result, job.original.states, self.progress.note)
            for note in {note for notes in result.notes.values() for note in notes}:
                self.progress.warn(f"{path}: {note}")
            scales = self._cache_scales(job)
            self.output.block(
                index,
                lambda: _stored(plan, path, result, scales),
                {"errors": result.errors, "notes": result.notes},
            )
            if result.errors:
                worst = max(result.errors, key=result.errors.__getitem__)
                self.progress.note(f"{worst} error {result.errors[worst]:.4f}")
            if index + 1 < len(model.blocks):
                for stream in (job.arriving, job.original):
                    if stream is not None:
                        stream.advance(BEHIND)

    def _passage(
        self, index: int, module: nn.Module, states: Activations | None, weights: Mapping[str, Tensor] | None = None
    ) -> Passage | None:
        if states is None:
            return None
        # training and cache scales want the states before the block once its layers are quantized
        whole = not self.sequential or self.plan.kv_cache is not None or bool(learning_layers(self.plan.layers))
        halves = None if whole or self.arriving is None else self.halves.find(self.model, index, module, self.arriving)
        return Passage(self.model, index, module, states, weights, halves)

    def replay_finished(self, index: int) -> None:
        """Take the states through a block that an earlier run finished."""
        if self.arriving is None:
            return
        weights = _weights_as_stored(self.plan, self.model, index)
        with torch.no_grad(), self.model.block(index, weights) as module:
            replay(self.model, index, module, self.original, weights)
            _fill_finished(self.output.directory, self.model, index, module)
            replay(self.model, index, module, self.arriving)

    def _cache_scales(self, job: BlockJob) -> dict[str, Tensor]:
        if self.plan.kv_cache is None or self.plan.format is None:
            return {}
        names = scale_names(*self.plan.kv_cache, self.plan.format.name)
        scales = cache_scales(job, self.plan.kv_cache)
        return {
            f"{job.path}.{name}": self.world.max_(scale.to(self.model.device))
            for name, scale in zip(names, scales, strict=True)
        }


def _weights_as_stored(plan: Plan, model: StreamedModel, index: int) -> dict[str, Tensor]:
    """A block's weights; those that stay dense already rounded to the dtype they are written in, since that is what the
    blocks after this one will really be fed by."""
    path = model.block_path(index)
    weights = model.read_block(index)
    for name, tensor in weights.items():
        if f"{path}.{name.removesuffix('.weight')}" not in plan.layers:
            weights[name] = tensor.to(plan.dtype)
    return weights


def _stored(plan: Plan, path: str, result: BlockResult, others: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """A block's tensors as they are stored."""
    for name, tensor in result.weights.items():
        layer = plan.layers.get(f"{path}.{name.removesuffix('.weight')}") if name.endswith(".weight") else None
        if layer is None or plan.format is None:
            yield f"{path}.{name}", tensor.to(plan.dtype)
            continue
        stored = plan.format.encode(result.tensors[layer.path], layer.scheme, plan.dtype)
        for suffix, packed in stored.items():
            yield f"{layer.path}.{suffix}", packed
    yield from others.items()


def _outside(plan: Plan, model: StreamedModel) -> Iterator[tuple[str, Tensor]]:
    blocks = f"{model.architecture.blocks}."
    for name in plan.layout:
        if not name.startswith(blocks):
            yield name, model.read_outside(name).to(plan.dtype)


def _fill_finished(directory: Path, model: StreamedModel, index: int, module: torch.nn.Module) -> None:
    """Put the weights of a finished block into its module: the quantized ones, and what transforms made of others."""
    checkpoint = open_artifact(SafetensorsCheckpoint(directory))
    if not isinstance(checkpoint, ArtifactCheckpoint):
        return
    path = model.block_path(index)
    quantized = {layer.removeprefix(f"{path}.") for layer in checkpoint.modules if layer.startswith(f"{path}.")}
    for name in quantized:
        dense = checkpoint.qtensor(f"{path}.{name}").to(model.device).dequantize(torch.float32)
        place_weight(model, module, name, dense)
    others = [name for name, _ in module.named_parameters() if name.removesuffix(".weight") not in quantized]
    state = {name: checkpoint.read(f"{path}.{name}").to(model.device, model.dtype) for name in others}
    module.load_state_dict(state, strict=False, assign=True)
    module.requires_grad_(False)
