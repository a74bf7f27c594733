"""What has to be known of an artifact to serve it, read from headers and configuration alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowbit.core.errors import CheckpointError
from lowbit.core.scheme import Scheme


@dataclass(frozen=True)
class Artifact:
    """location: directory or GGUF file as the runtime sees it (inside a container: the path there).

    format: "gguf", "dense" or the name of a lowbit format. labels: the different schemes of its layers, see `label`.
    context: longest sequence the model was made for; 0 unknown. weight_bytes: of all tensors. dtype: of the unquantized
    ones. config: config.json without quantization_config, {} for GGUF. record: lowbit.json, None without one.
    """

    location: str
    name: str
    format: str
    labels: tuple[str, ...]
    model_type: str = ""
    context: int = 0
    weight_bytes: int = 0
    dtype: str = ""
    chat_template: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)
    record: Mapping[str, Any] | None = None

    @property
    def scheme(self) -> str:
        """Its schemes for people: "w4a16", "Q4_K, Q6_K"."""
        return ", ".join(self.labels)


def label(scheme: Scheme) -> str:
    """A scheme's name, then what some runtimes mind: "w4a16", "w4a16 asymmetric reordered", "fp8 tensor static"."""
    words = [scheme.name]
    weights, activations = scheme.weights, scheme.activations
    if weights is None:
        return scheme.name
    if weights.kind == "float":
        words.append(weights.granularity)
    if not weights.symmetric:
        words.append("asymmetric")
    if weights.reordered:
        words.append("reordered")
    if activations is not None and not activations.dynamic:
        words.append("static")
    return " ".join(words)


def read_artifact(path: str | Path) -> Artifact:
    """Read what `path` (a directory or a .gguf file) is. Raises CheckpointError or FormatError for what is missing,
    broken off or unknown."""
    location = Path(path)
    if location.suffix == ".gguf":
        return _gguf(location)
    if not location.exists():
        raise CheckpointError(
            f"{location} does not exist", hint="give an artifact: a directory, a .gguf file, or a hub id (org/name)"
        )
    if location.is_dir() and not (location / "config.json").is_file():
        files = sorted(location.glob("*.gguf"))
        whole = [file for file in files if "-of-" not in file.name or "-00001-of-" in file.name]
        if len(whole) == 1:
            return _gguf(whole[0])
        if whole:
            raise CheckpointError(
                f"{location} holds {len(whole)} GGUF models", hint=f"name one: {', '.join(map(str, whole[:4]))}"
            )
    return _directory(location)


def _directory(location: Path) -> Artifact:
    from lowbit.core.checkpoint.safetensors import SafetensorsCheckpoint
    from lowbit.formats.reader import ArtifactCheckpoint

    raw = SafetensorsCheckpoint(location)
    config = {name: value for name, value in raw.config.items() if name != "quantization_config"}
    text = config.get("text_config", config)
    format = "dense"
    labels: tuple[str, ...] = ("w16a16",)
    if raw.config.get("quantization_config"):
        stored = ArtifactCheckpoint(raw)
        schemes = {stored.scheme(module) for module in stored.modules}
        format, labels = stored.format.name, tuple(sorted(label(scheme) for scheme in schemes if scheme)) or labels
    return Artifact(
        location=str(location.absolute()),
        name=location.absolute().name,
        format=format,
        labels=labels,
        model_type=str(config.get("model_type", "")),
        context=int(text.get("max_position_embeddings") or 0),
        weight_bytes=sum(spec.nbytes for spec in raw.tensors.values()),
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch."),
        chat_template=_has_template(location),
        config=config,
        record=_record(location / "lowbit.json"),
    )


def _gguf(file: Path) -> Artifact:
    from lowbit.core.checkpoint.gguf_source import GgufSource

    if not file.is_file():
        raise CheckpointError(f"{file} does not exist", hint="give a .gguf file that is there")
    source = GgufSource(file)
    metadata = source.header.metadata
    kinds = sorted({tensor.ggml_type for tensor in source.tensors.values() if len(tensor.shape) > 1})
    stem = file.name.removesuffix(".gguf")
    first, _, _ = stem.partition("-00001-of-")
    record = _record(file.with_name(f"{stem}.lowbit.json")) or _record(file.with_name(f"{first}.lowbit.json"))
    return Artifact(
        location=str(file.absolute()),
        name=first,
        format="gguf",
        labels=tuple(kinds),
        model_type=source.architecture,
        context=int(metadata.get(f"{source.architecture}.context_length") or 0),
        weight_bytes=sum(tensor.nbytes for tensor in source.tensors.values()),
        chat_template="tokenizer.chat_template" in metadata,
        record=record,
    )


def _record(file: Path) -> Mapping[str, Any] | None:
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"{file} is not readable as JSON: {error}", hint="copy the artifact again") from error
    return content if isinstance(content, dict) else None


def _has_template(location: Path) -> bool:
    if any((location / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    file = location / "tokenizer_config.json"
    return file.is_file() and '"chat_template"' in file.read_text()
