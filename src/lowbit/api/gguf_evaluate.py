"""A GGUF file against its base, twice: through its dequantized weights, and as the real llama.cpp computes it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lowbit.core.checkpoint import open_checkpoint
from lowbit.core.checkpoint.gguf import GgufCheckpoint
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
) -> tuple[LlamaCppMeasurement, float]:
    """Compare what llama.cpp itself predicts with the base's predictions in float32, token by token; and, second, the KL
    divergence of the dequantized weights on the same tokens.

    What sets the two apart is that llama.cpp rounds activations, and counts in lower precision. Raises LowbitError
    subclasses.
    """
    checkpoint = open_checkpoint(base)
    tokens = first_windows(dataset, load_tokenizer(checkpoint), windows, context)
    place = pick_device(device)
    expected = _log_probs(StreamedModel(checkpoint, place, torch.float32), tokens)
    dequantized = GgufCheckpoint(Path(file), checkpoint.config, torch.float32)
    dense = _log_probs(StreamedModel(dequantized, place, torch.float32), tokens)
    kl = (expected.exp() * (expected - dense)).sum(-1).mean().item()
    return measure_llama_cpp(Path(file), tokens, expected, progress or Silent()), kl


def _log_probs(model: StreamedModel, tokens: Tensor) -> Tensor:
    """[windows, tokens, vocabulary] float32 on the CPU."""
    with torch.no_grad(), model.whole() as whole:
        return torch.cat([whole(input_ids=row[None].to(model.device)).logits.log_softmax(-1).cpu() for row in tokens])
