"""The last pass within a run: train on the artifact as it was written, then write what changed.

The new numbers are put aside whole before the first of them goes into the artifact, so a run that is killed at any moment
continues to the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from lowbit.core.checkpoint.safetensors import SafetensorsCheckpoint
from lowbit.core.primitives import stored_scale
from lowbit.core.progress import Progress
from lowbit.core.streamed_model import StreamedModel
from lowbit.formats.reader import ArtifactCheckpoint
from lowbit.methods.even_grid import EvenGrid
from lowbit.pipeline.activations import Activations
from lowbit.pipeline.codes import Codes, Start
from lowbit.pipeline.factors import Factors, norm_unit
from lowbit.pipeline.plan import LayerPlan, Plan
from lowbit.pipeline.run import Streams, calibration_states
from lowbit.pipeline.tune import TuneOptions, last_states, tune
from lowbit.pipeline.writer import ShardedWriter, save_tensors

_STATE, _RESULT = "tuning.safetensors", "tuned.safetensors"
_CODES = ".codes"


def tune_artifact(
    plan: Plan,
    model: StreamedModel,
    windows: Tensor,
    writer: ShardedWriter,
    options: TuneOptions,
    streams: Streams,
    progress: Progress,
) -> dict[str, Any]:
    """Tune the artifact in the writer's directory; returns KL on held-out calibration windows "before" and "after" and, where
    codes were trained, "moved_codes", the share of them that changed."""
    directory = writer.directory
    stored = ArtifactCheckpoint(SafetensorsCheckpoint(directory))
    if not (directory / _RESULT).exists():
        artifact = StreamedModel(stored, model.device, model.dtype)
        factors = Factors(artifact, _columns(plan, stored), directory / _STATE, model.device)
        codes = _codes(plan, model, stored, directory / _STATE) if options.codes else None
        teacher: Activations = calibration_states(model, windows, streams)
        last_states(model, windows, teacher, progress)
        found = tune(model, artifact, factors, teacher, windows, options, progress, codes)
        _put_aside(stored, artifact, factors, codes, directory / _RESULT, found.record())
    return _write(plan, stored, writer, directory / _RESULT)


def remove_tuning(directory: Path) -> None:
    """Drop the training state of a finished artifact."""
    for name in (_STATE, _RESULT):
        (directory / name).unlink(missing_ok=True)


def _columns(plan: Plan, stored: ArtifactCheckpoint) -> dict[str, Tensor]:
    """The group of each input column of every layer whose scales are plain floats for rows and groups of columns."""
    found = {}
    for path, layer in plan.layers.items():
        weights = layer.scheme.weights
        if weights is not None and weights.granularity in ("group", "channel") and weights.kind in ("int", "float"):
            found[path] = stored.qtensor(path).column_groups()
    return found


def has_even_codes(layer: LayerPlan) -> bool:
    """Whether a layer is one of integers, whose codes can be trained."""
    weights = layer.scheme.weights
    return weights is not None and weights.kind == "int" and weights.granularity in ("group", "channel")


def _codes(plan: Plan, model: StreamedModel, stored: ArtifactCheckpoint, file: Path) -> Codes:
    """The codes of every layer of integers, beside the base's weights. The base is the very model whose weights were rounded:
    a recipe with transforms trains no codes."""
    transposed = model.architecture.transposed

    def starts(index: int) -> dict[str, Start]:
        found = {}
        for name, weight in model.read_block(index).items():
            module = f"{model.block_path(index)}.{name.removesuffix('.weight')}"
            if module in plan.layers and has_even_codes(plan.layers[module]):
                grid = EvenGrid.of_tensor(stored.qtensor(module).to(model.device))
                found[name] = Start(weight.T if transposed else weight, grid)
        return found

    return Codes(map(starts, range(len(model.blocks))), file, transposed=transposed)


def _put_aside(
    stored: ArtifactCheckpoint,
    artifact: StreamedModel,
    factors: Factors,
    codes: Codes | None,
    file: Path,
    said: Mapping[str, float],
) -> None:
    """All changed scales, codes and norm weights, as they will be stored."""
    changed: dict[str, Tensor] = {}
    for index in range(len(artifact.blocks)):
        path = artifact.block_path(index)
        for name, factor in factors.block(index).items():
            module, own = f"{path}.{name.removesuffix('.weight')}", factor.cpu()
            if module in factors.columns:
                scale = stored.qtensor(module).scale
                changed[module] = stored_scale(scale.float() * (1 + own), scale.dtype).to(scale.dtype)
                trained = codes.result(index, name) if codes else None
                if trained is not None:
                    changed[module + _CODES] = trained.cpu()
            else:
                weight = stored.read(f"{path}.{name}")
                changed[f"{path}.{name}"] = (weight.float() + own * norm_unit(weight)).to(weight.dtype)
    save_tensors(file, changed, {key: repr(value) for key, value in said.items()})


def _write(plan: Plan, stored: ArtifactCheckpoint, writer: ShardedWriter, file: Path) -> dict[str, Any]:
    assert plan.format is not None
    with safe_open(file, "pt") as changed:
        names = set(changed.keys())
        for name in sorted(name for name in names if not name.endswith(_CODES)):
            layer = plan.layers.get(name)
            if layer is None:
                writer.write(name, changed.get_tensor(name))
                continue
            tensor = replace(stored.qtensor(name), scale=changed.get_tensor(name))
            if name + _CODES in names:
                tensor = replace(tensor, codes=changed.get_tensor(name + _CODES))
            for suffix, packed in plan.format.encode(tensor, layer.scheme, plan.dtype).items():
                writer.write(f"{name}.{suffix}", packed)
        writer.sync()
        return {key: float(value) for key, value in changed.metadata().items()}
