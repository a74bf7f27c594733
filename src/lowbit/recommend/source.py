"""A model as a recommendation sees it: shapes and a configuration, whether or not its weights are at hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.core.architectures import known_architecture
from lowbit.core.checkpoint import open_checkpoint
from lowbit.core.checkpoint.safetensors import read_json
from lowbit.core.contracts import Checkpoint, TensorSpec
from lowbit.core.errors import CheckpointError
from lowbit.core.experts import take_experts_apart
from lowbit.core.scheme import DTYPES
from lowbit.core.skeleton import build_skeleton

_CONFIG, _TOKENIZER = "config.json", ("tokenizer.json", "tokenizer.model", "chat_template.jinja")


class ConfigCheckpoint:
    """contracts.Checkpoint of a model of which only config.json is there: transformers' modelling code, on the meta device,
    says every parameter's shape. Raises ArchitectureError for a model type that transformers does not know."""

    def __init__(self, location: Path, config: Mapping[str, Any]) -> None:
        self.location, self.config = location, dict(config)
        named = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
        dtype = DTYPES.get(named, torch.bfloat16)
        self._tensors = {
            name: TensorSpec(dtype, tuple(parameter.shape)) for name, parameter in _as_stored(config).named_parameters()
        }

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """Every parameter, as it would be stored."""
        return self._tensors

    def read(self, name: str) -> Tensor:
        """There is nothing to read. Raises CheckpointError."""
        raise CheckpointError(f"{self.location} holds no weights, so {name!r} cannot be read")

    def companions(self) -> dict[str, Path]:
        """The tokenizer's files, where they lie beside the configuration."""
        folder = self.location if self.location.is_dir() else self.location.parent
        return {name: folder / name for name in _TOKENIZER if (folder / name).is_file()}

    def identity(self) -> str:
        """Nothing is known of the weights."""
        return ""


def _as_stored(config: Mapping[str, Any]) -> nn.Module:
    """The model with parameters named as checkpoints name them: experts that transformers fuses are apart there."""
    skeleton: nn.Module = build_skeleton(config)
    model_type = str(config.get("model_type", ""))
    known = known_architecture(model_type)
    if known is not None:
        blocks = skeleton.get_submodule(known.blocks)
        assert isinstance(blocks, nn.ModuleList)
        take_experts_apart(model_type, known, blocks)
    return skeleton


def open_shapes(model: str | Path, *, revision: str | None = None) -> Checkpoint:
    """A checkpoint directory, an artifact, a .gguf file, a config.json (or a directory with nothing but one), or a hub id,
    of which only config.json and the tokenizer are downloaded. Raises CheckpointError."""
    path = Path(model)
    if path.suffix == ".json" and path.is_file():
        return ConfigCheckpoint(path, read_json(path))
    if path.is_dir() and (path / _CONFIG).is_file() and not any(path.glob("*.safetensors*")):
        return ConfigCheckpoint(path, read_json(path / _CONFIG))
    if path.exists() or path.suffix == ".gguf" or str(model).startswith((".", "/", "~")):
        return open_checkpoint(path)
    folder = _download(str(model), revision)
    return ConfigCheckpoint(folder, read_json(folder / _CONFIG))


def _download(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=[_CONFIG, *_TOKENIZER]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, HTTPError, OSError) as error:
        cause = (str(error).strip().splitlines() or ["no connection"])[0][:200]
        raise CheckpointError(
            f"{repo} is no local directory and its config.json could not be downloaded from the hub: {cause}",
            hint="check the name, log in with `hf auth login` for gated models, or give a config.json",
        ) from error
