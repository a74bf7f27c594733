"""Perplexity of a model or artifact and, against a base, KL divergence and top-1 agreement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lowbit.core.checkpoint import open_checkpoint
from lowbit.core.checkpoint.gguf import GgufCheckpoint
from lowbit.core.contracts import Checkpoint
from lowbit.core.hardware import pick_device
from lowbit.core.progress import Progress, Silent
from lowbit.core.streamed_model import StreamedModel
from lowbit.core.text import first_windows
from lowbit.core.tokenizer import load_tokenizer
from lowbit.evals.divergence import Measurement, measure
from lowbit.formats.reader import open_artifact


def evaluate(
    artifact: str | Path,
    *,
    base: str | Path | None = None,
    dataset: str = "pydoc",
    windows: int = 16,
    context: int = 1024,
    device: str = "auto",
    progress: Progress | None = None,
) -> Measurement:
    """Measure an artifact (or any checkpoint) in float32 on the first `windows` windows of `context` tokens of a text.

    Weights are dequantized exactly; activation quantization is not simulated. Raises LowbitError subclasses.
    """
    place = pick_device(device)
    if Path(artifact).suffix == ".gguf" and base is not None:
        checkpoint: Checkpoint = GgufCheckpoint(Path(artifact), open_checkpoint(base).config, torch.float32)
    else:
        checkpoint = open_artifact(open_checkpoint(artifact), torch.float32)
    tokens = first_windows(dataset, load_tokenizer(open_checkpoint(base or artifact)), windows, context)
    return measure(
        StreamedModel(checkpoint, place, torch.float32),
        tokens,
        progress or Silent(),
        base=_float32(base, place) if base is not None else None,
    )


def _float32(model: str | Path, device: Any) -> StreamedModel:
    return StreamedModel(open_artifact(open_checkpoint(model), torch.float32), device, torch.float32)
