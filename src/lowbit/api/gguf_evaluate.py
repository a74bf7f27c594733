"""A GGUF file against its base, twice: through its dequantized weights, and as the real llama.cpp computes it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lowbit.core.checkpoint import open_checkpoint
from lowbit.core.hardware import pick_device
from lowbit.core.progress import Progress, Silent
from lowbit.core.streamed_model import StreamedModel
from lowbit.core.text import first_windows
from lowbit.core.tokenizer import load_tokenizer
from lowbit.evals.llama_cpp import LlamaCppMeasurement, measure_llama_cpp


def evaluate_llama_cpp(
    file: str | Path,
    *,
    base: str | Path,
    dataset: str = "pydoc",
    windows: int = 2,
    context: int = 128,
    device: str = "auto",
    progress: Progress | None = None,
) -> LlamaCppMeasurement:
    """Compare what llama.cpp itself predicts with the base's predictions in float32, token by token.

    Rounding of activations, which llama.cpp does and the dequantized weights do not show, is part of it. Raises
    LowbitError subclasses.
    """
    checkpoint = open_checkpoint(base)
    tokens = first_windows(dataset, load_tokenizer(checkpoint), windows, context)
    model = StreamedModel(checkpoint, pick_device(device), torch.float32)
    return measure_llama_cpp(Path(file), tokens, _log_probs(model, tokens), progress or Silent())


def _log_probs(model: StreamedModel, tokens: Tensor) -> Tensor:
    """[windows, tokens, vocabulary] float32 on the CPU."""
    with torch.no_grad(), model.whole() as whole:
        return torch.cat([whole(input_ids=row[None].to(model.device)).logits.log_softmax(-1).cpu() for row in tokens])
