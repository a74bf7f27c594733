"""The same numbers in another format: an artifact is re-packed without loss, or refused with the reason."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lowbit.api.record import read_record
from lowbit.core.checkpoint import open_checkpoint
from lowbit.core.contracts import TensorSpec
from lowbit.core.errors import FormatError, OutputError
from lowbit.core.progress import Progress, Silent
from lowbit.core.qtensor import QTensor
from lowbit.core.scheme import Scheme
from lowbit.formats import FORMATS, get_format
from lowbit.formats.layout import StoredFormat
from lowbit.formats.reader import ArtifactCheckpoint, open_artifact
from lowbit.pipeline.writer import ShardedWriter, output_errors, write_json


def convert(artifact: str | Path, *, format: str, output: str | Path, progress: Progress | None = None) -> Path:
    """Re-pack every layer of a quantized checkpoint (ours or another tool's) into `format`, bit for bit.

    Codes, scales and zero points stay what they are; a layer whose zero points all lie in the middle counts as symmetric.
    Raises FormatError, before anything is written, when a layer cannot be held without loss, and OutputError.
    """
    progress, target, output = progress or Silent(), get_format(format), Path(output)
    source = open_artifact(open_checkpoint(artifact))
    if not isinstance(source, ArtifactCheckpoint):
        raise FormatError(f"{artifact} is not quantized, so there is nothing to convert", hint="lowbit quantize")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OutputError(f"{output} exists already", hint="choose another -o, or remove it first")
    dtype = _model_dtype(source)
    progress.start("check", len(source.modules))
    schemes: dict[str, Scheme] = {}
    for path in source.modules:
        schemes[path] = _checked(source, path, target, dtype)
        progress.advance()
    config = target.quantization_config(schemes, _skipped(source))
    work = output.with_name(f".{output.name}.unfinished")
    shutil.rmtree(work, ignore_errors=True)
    _write(source, schemes, target, dtype, work, progress)
    _write_companions(source, config, target, work)
    with output_errors(work):
        os.rename(work, output)
    return output


def refitted(tensor: QTensor, scheme: Scheme, target: StoredFormat) -> tuple[QTensor, Scheme]:
    """The same numbers as `target` calls them: with zero points said or left unsaid. Raises FormatError with its reason."""
    reason = target.refuse(scheme)
    if reason is None:
        return tensor, scheme
    weights = scheme.weights
    if weights is not None and weights.kind == "int":
        middle = torch.full_like(tensor.scale, weights.middle, dtype=torch.uint8)
        if weights.symmetric:
            other, zero = replace(weights, symmetric=False), middle
        elif tensor.zero is not None and torch.equal(tensor.zero, middle):
            other, zero = replace(weights, symmetric=True), None
        else:
            raise FormatError(reason, hint=_holders(scheme))
        changed = Scheme(scheme.name, other, scheme.activations)
        if target.refuse(changed) is None:
            return replace(tensor, scheme=other, zero=zero), changed
    raise FormatError(reason, hint=_holders(scheme))


def _holders(scheme: Scheme) -> str:
    names = [name for name in FORMATS.names() if get_format(name).refuse(scheme) is None]
    return f"formats that hold these numbers: {', '.join(names)}"


def _checked(source: ArtifactCheckpoint, path: str, target: StoredFormat, dtype: torch.dtype) -> Scheme:
    """The scheme that a layer will have in `target`, once it has been packed on trial and read back equal."""
    scheme = source.scheme(path)
    assert scheme is not None
    try:
        tensor, fitted = refitted(source.qtensor(path), scheme, target)
        back = target.decode(target.encode(tensor, fitted, dtype), fitted)
    except FormatError as error:
        raise FormatError(f"{path} cannot be kept as it is: {error.message}", hint=error.hint) from error
    if not torch.equal(back.dequantize(), tensor.dequantize()):
        raise FormatError(f"{path} would change its weights in format {target.name!r}, nothing was written")
    return fitted


def _write(
    source: ArtifactCheckpoint,
    schemes: Mapping[str, Scheme],
    target: StoredFormat,
    dtype: torch.dtype,
    work: Path,
    progress: Progress,
) -> None:
    layout: dict[str, TensorSpec] = {}
    for name, spec in source.tensors.items():
        path = name.removesuffix(".weight")
        if path not in schemes or path == name:
            layout[name] = spec
            continue
        rows, columns = spec.shape
        stored = target.layout(schemes[path], (rows, columns), dtype)
        layout |= {f"{path}.{suffix}": own for suffix, own in stored.items()}
    writer = ShardedWriter(work, layout)
    progress.start("convert", len(schemes))
    for name in source.tensors:
        path = name.removesuffix(".weight")
        if path not in schemes or path == name:
            writer.write(name, source.read(name))
            continue
        scheme = source.scheme(path)
        assert scheme is not None
        tensor, fitted = refitted(source.qtensor(path), scheme, target)
        for suffix, stored_tensor in target.encode(tensor, fitted, dtype).items():
            writer.write(f"{path}.{suffix}", stored_tensor)
        progress.advance()
    checksums = writer.finish()
    record = read_record(source.location)
    if record is not None:
        record |= {"recipe": {**record["recipe"], "format": target.name}, "checksums": checksums}
        record["converted_from"] = source.format.name
        record["bytes"] = sum(spec.nbytes for spec in layout.values())
        write_json(work / "lowbit.json", record)


def _write_companions(
    source: ArtifactCheckpoint, quantization: dict[str, Any], target: StoredFormat, work: Path
) -> None:
    write_json(work / "config.json", {**source.config, "quantization_config": quantization})
    for name, content in target.files(quantization).items():
        write_json(work / name, content)
    with output_errors(work):
        for name, file in source.companions().items():
            shutil.copyfile(file, work / name)


def _skipped(source: ArtifactCheckpoint) -> list[str]:
    """Paths of linear-looking weights that stay dense: those that the old configuration would have left out too."""
    dense = [name.removesuffix(".weight") for name, spec in source.tensors.items() if len(spec.shape) == 2]
    quantized = set(source.modules)
    return [path for path in dense if path not in quantized and not _is_embedding(path)]


def _is_embedding(path: str) -> bool:
    return any(part in path.rpartition(".")[2] for part in ("embed", "wte", "wpe"))


def _model_dtype(source: ArtifactCheckpoint) -> torch.dtype:
    dense = next(spec for name, spec in source.tensors.items() if name.removesuffix(".weight") in source.modules)
    return dense.dtype
