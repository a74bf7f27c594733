"""The last pass over a GGUF file: float scales and minimums of the blocks' layers, and their norms, trained end to end.

Integer scales stay, and codes where they are not to be trained too; what moves is the float16 pair of every super-block
(every block of types without super-blocks) and the float32 norms, so the file keeps its types and size. As in the other
formats, all that changes is put aside whole before the first of it is written, so a run that is killed at any moment
continues to the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lowbit.core.contracts import Checkpoint, TensorSpec
from lowbit.core.ggml_types import ggml_type
from lowbit.core.progress import Progress
from lowbit.core.streamed_model import StreamedModel
from lowbit.methods.even_grid import EvenGrid
from lowbit.methods.kquants import CODECS, decode
from lowbit.methods.kquants.codec import Codec
from lowbit.methods.kquants.grid import Grid
from lowbit.methods.learned_blocks import BlockMatrix
from lowbit.pipeline.codes import Codes, Start
from lowbit.pipeline.factors import Factors, norm_unit
from lowbit.pipeline.gguf_encode import GgufJob
from lowbit.pipeline.gguf_names import LinearTensor, norm_tensors, row_order
from lowbit.pipeline.run import Streams, calibration_states
from lowbit.pipeline.tune import TuneOptions, last_states, tune
from lowbit.pipeline.writer import save_tensors

_STATE, _RESULT = "tuning.safetensors", "tuned.safetensors"
_MINIMUM, _CODES = ".minimum", ".codes"


def tune_gguf(
    job: GgufJob,
    model: StreamedModel,
    linears: Mapping[str, LinearTensor],
    windows: Tensor,
    options: TuneOptions,
    streams: Streams,
    progress: Progress,
) -> dict[str, Any]:
    """Tune the file that the job has written; returns KL on held-out calibration windows "before" and "after" and, where codes
    were trained, "moved_codes", the share of them that changed.

    linears: the layers that were rounded, by module path. Raises LowbitError subclasses.
    """
    directory = job.writer.directory
    if not (directory / _RESULT).exists():
        written = _Written(job, model, linears)
        artifact = StreamedModel(written, model.device, model.dtype)
        columns, minimums = _grids(job, linears, written)
        factors = Factors(artifact, columns, directory / _STATE, model.device, minimums)
        codes = _codes(job, model, linears, written, directory / _STATE) if options.codes else None
        teacher = calibration_states(model, windows, streams)
        last_states(model, windows, teacher, progress)
        found = tune(model, artifact, factors, teacher, windows, options, progress, codes)
        _put_aside(job, artifact, factors, codes, written, directory / _RESULT, found.record())
    return _write(job, directory / _RESULT)


class _Written:
    """contracts.Checkpoint over a file that is being made, under Hugging Face names, rows in the checkpoint's order."""

    def __init__(self, job: GgufJob, model: StreamedModel, linears: Mapping[str, LinearTensor]) -> None:
        self.job, self.model = job, model
        self.base: Checkpoint = model.checkpoint
        self.location, self.config = self.base.location, self.base.config
        self.linears = {model.stored_name(f"{path}.weight"): linear for path, linear in linears.items()}
        self.tables = _tables(job, model)
        self.norms = norm_tensors(model, job.source)

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        return self.base.tensors

    def read(self, name: str) -> Tensor:
        if name in self.tables:
            return self._dense(self.tables[name])
        if name not in self.linears:
            return self.base.read(name)
        tensor = self.linears[name].tensor
        rows = self.in_checkpoint_order(tensor, self._dense(tensor), self.base.read(name))
        return rows.T.contiguous() if self.model.architecture.transposed else rows

    def companions(self) -> dict[str, Path]:
        return self.base.companions()

    def identity(self) -> str:
        return self.base.identity()

    def stored(self, tensor: str) -> Tensor:
        """A tensor's bytes by row, uint8 [rows, bytes]."""
        rows, columns = self.job.source.tensors[tensor].shape
        row_bytes = ggml_type(self.job.types[tensor]).row_bytes(columns)
        return self.job.writer.read(tensor, rows * row_bytes).view(rows, row_bytes)

    def order(self, tensor: str, stored: Tensor) -> Tensor:
        """[out] int64: row i of the file is row order[i] of the checkpoint's weight `stored`."""
        matrix = stored.T if self.model.architecture.transposed else stored
        order = row_order(matrix, self.job.source.dense(tensor))
        assert order is not None  # second-order rounding has refused other converters
        return order

    def in_checkpoint_order(self, tensor: str, rows: Tensor, stored: Tensor) -> Tensor:
        """Rows of the file where the checkpoint has them."""
        ordered = torch.empty_like(rows)
        ordered[self.order(tensor, stored)] = rows
        return ordered

    def _dense(self, tensor: str) -> Tensor:
        return decode(self.job.types[tensor], self.stored(tensor), self.job.source.tensors[tensor].shape[1])


def _tables(job: GgufJob, model: StreamedModel) -> dict[str, str]:
    """Embedding and head: the checkpoint's name -> the file's tensor, where the file has one of the same shape."""
    found = {}
    skeleton = model.skeleton
    modules = {"token_embd.weight": skeleton.get_input_embeddings(), "output.weight": skeleton.get_output_embeddings()}
    names = {id(parameter): name for name, parameter in model.skeleton.named_parameters()}
    for tensor, module in modules.items():
        weight = None if module is None else module.weight
        known = job.source.tensors.get(tensor)
        if weight is not None and id(weight) in names and known is not None and known.shape == tuple(weight.shape):
            found[model.stored_name(names[id(weight)])] = tensor
    return found


def _grids(
    job: GgufJob, linears: Mapping[str, LinearTensor], written: _Written
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of every layer with float scales: the scale of each input column, and its minimums in the checkpoint's row order."""
    columns, minimums = {}, {}
    for path, linear in linears.items():
        codec = CODECS[job.types[linear.tensor]]
        grid, codes = codec.unpack(written.stored(linear.tensor))
        if grid.d.dtype != torch.float16:  # MXFP4's powers of two do not move a little
            continue
        columns[path] = torch.arange(codes.shape[1]) // (codes.shape[1] // grid.d.shape[1])
        if grid.dmin is not None:
            name = written.model.stored_name(f"{path}.weight")
            minimum = codec.scale_min(grid)[1]
            minimums[path] = written.in_checkpoint_order(linear.tensor, minimum, written.base.read(name)).half()
    return columns, minimums


def _codes(
    job: GgufJob, model: StreamedModel, linears: Mapping[str, LinearTensor], written: _Written, file: Path
) -> Codes:
    """The codes of every layer of a type with even levels, rows in the checkpoint's order."""
    transposed = model.architecture.transposed

    def starts(index: int) -> dict[str, Start]:
        found = {}
        for name, weight in model.read_block(index).items():
            linear = linears.get(f"{model.block_path(index)}.{name.removesuffix('.weight')}")
            if linear is None or not CODECS[job.types[linear.tensor]].uniform:
                continue
            codec, order = CODECS[job.types[linear.tensor]], written.order(linear.tensor, weight.cpu())
            matrix = BlockMatrix(codec, *codec.unpack(written.stored(linear.tensor))).rows(torch.argsort(order))
            found[name] = Start(weight.T if transposed else weight, EvenGrid.of_blocks(matrix).to(model.device))
        return found

    return Codes(map(starts, range(len(model.blocks))), file, transposed=transposed)


def _put_aside(
    job: GgufJob,
    artifact: StreamedModel,
    factors: Factors,
    codes: Codes | None,
    written: _Written,
    file: Path,
    said: Mapping[str, float],
) -> None:
    """All changed scales, minimums, codes and norms, as they will be stored, by tensor name."""
    changed: dict[str, Tensor] = {}
    for index in range(len(artifact.blocks)):
        for name, factor in factors.block(index).items():
            own = factor.cpu()
            full = f"{artifact.block_path(index)}.{name}"
            stored = written.base.read(artifact.stored_name(full))
            linear = written.linears.get(artifact.stored_name(full))
            if linear is not None and full.removesuffix(".weight") in factors.columns:
                grid = CODECS[job.types[linear.tensor]].unpack(written.stored(linear.tensor))[0]
                order = written.order(linear.tensor, stored)
                changed |= _moved(linear.tensor, grid, own[..., order, :])
                trained = codes.result(index, name) if codes else None
                if trained is not None:
                    changed[linear.tensor + _CODES] = trained.cpu()[order]
            elif full in written.norms:
                tensor = written.norms[full]
                # llama.cpp stores some norms as 1 + weight: what is added to the one is added to the other
                changed[tensor] = job.source.dense(tensor) + own * norm_unit(stored)
    save_tensors(file, changed, {key: repr(value) for key, value in said.items()})


def _moved(tensor: str, grid: Grid, factor: Tensor) -> dict[str, Tensor]:
    """Float scales and minimums of a layer times 1 + factor ([out, blocks], with minimums [2, out, blocks])."""
    if grid.dmin is None:
        return {tensor: _times(grid.d, factor)}
    return {tensor: _times(grid.d, factor[0]), tensor + _MINIMUM: _times(grid.dmin, factor[1])}


def _times(scale: Tensor, factor: Tensor) -> Tensor:
    moved = (scale.float() * (1 + factor)).half()
    return torch.where(torch.isfinite(moved), moved, scale).contiguous()


def _write(job: GgufJob, file: Path) -> dict[str, Any]:
    with safe_open(file, "pt") as changed:
        names = set(changed.keys())
        for name in sorted(name for name in names if not name.endswith((_MINIMUM, _CODES))):
            kind, value = job.types[name], changed.get_tensor(name)
            if kind not in CODECS:
                job.writer.write(name, value.view(torch.uint8))
                continue
            minimum, codes = (
                changed.get_tensor(name + of) if name + of in names else None for of in (_MINIMUM, _CODES)
            )
            job.writer.write(name, _with_numbers(CODECS[kind], job, name, value, minimum, codes))
        job.writer.sync()
        return {key: float(value) for key, value in changed.metadata().items()}


def _with_numbers(
    codec: Codec, job: GgufJob, name: str, scale: Tensor, minimum: Tensor | None, trained: Tensor | None
) -> Tensor:
    rows, columns = job.source.tensors[name].shape
    row_bytes = ggml_type(job.types[name]).row_bytes(columns)
    grid, codes = codec.unpack(job.writer.read(name, rows * row_bytes).view(rows, row_bytes))
    return codec.pack(replace(grid, d=scale, dmin=minimum), codes if trained is None else trained)
