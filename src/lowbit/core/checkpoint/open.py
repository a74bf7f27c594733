"""One name for every kind of checkpoint: a directory, a GGUF file or a hub id."""

from __future__ import annotations

import re
from pathlib import Path

from lowbit.core.checkpoint.gguf import GgufCheckpoint
from lowbit.core.checkpoint.safetensors import SafetensorsCheckpoint
from lowbit.core.contracts import Checkpoint
from lowbit.core.errors import CheckpointError

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]


def open_checkpoint(model: str | Path, *, revision: str | None = None) -> Checkpoint:
    """Open a local directory, a .gguf file, or a Hugging Face hub id (downloaded once into the hub's own cache).

    Raises CheckpointError: not found, truncated, pickled, or the download failed.
    """
    path = Path(model)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise CheckpointError(f"{path} does not exist")
        return GgufCheckpoint(path)
    if path.is_dir():
        return SafetensorsCheckpoint(path)
    if path.exists():
        raise CheckpointError(f"{path} is neither a directory nor a .gguf file")
    if str(model).startswith((".", "/", "~")) or not _HUB_ID.fullmatch(str(model)):
        raise CheckpointError(f"{model} does not exist", hint="give a directory, a .gguf file or a hub id (org/name)")
    return SafetensorsCheckpoint(_download(str(model), revision))


def _download(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, HTTPError, OSError) as error:
        cause = (str(error).strip().splitlines() or ["no connection"])[0][:200]
        raise CheckpointError(
            f"{repo} is no local directory and could not be downloaded from the hub: {cause}",
            hint="check the name and --revision, log in with `hf auth login` for gated models, or run it again: "
            "finished files are kept",
        ) from error
