"""The tokenizer of a checkpoint, by transformers."""

from __future__ import annotations

from typing import Any

from lowbit.core.contracts import Checkpoint
from lowbit.core.errors import CheckpointError


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """transformers' tokenizer for a checkpoint, from its directory or out of its GGUF file. Raises CheckpointError."""
    from transformers import AutoTokenizer

    location = checkpoint.location
    try:
        if location.suffix == ".gguf":
            return AutoTokenizer.from_pretrained(location.parent, gguf_file=location.name)
        return AutoTokenizer.from_pretrained(location)
    except (OSError, ValueError, KeyError, ImportError) as error:
        cause = (str(error).strip().splitlines() or ["unknown cause"])[0][:200]
        raise CheckpointError(
            f"{location} has no tokenizer that transformers can read: {cause}",
            hint="put the model's tokenizer files (tokenizer.json, tokenizer_config.json) beside its weights",
        ) from error
