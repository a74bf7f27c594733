"""A GGUF file against its base, twice: through its dequantized weights, and as the real llama.cpp computes it."""

from __future__ import annotations

from pathlib import Path

import torch

from lowbit.core.checkpoint import open_checkpoint
from lowbit.core.checkpoint.gguf import GgufCheckpoint
from lowbit.core.hardware import pick_device
from lowbit.core.progress import Progress, Silent
from lowbit.core.streamed_model import StreamedModel
from lowbit.core.text import first_windows
from lowbit.core.tokenizer import load_tokenizer
from lowbit.evals.llama_cpp import LISTED, embedded_server
from lowbit.evals.served import ServedDivergence, measure_served
from lowbit.evals.tasks.endpoint import Endpoint


def evaluate_llama_cpp(
    file: str | Path,
    *,
    base: str | Path,
    dataset: str = "pydoc",
    windows: int = 2,
    context: int = 128,
    device: str = "auto",
    progress: Progress | None = None,
) -> tuple[ServedDivergence, float]:
    """Compare what llama.cpp itself predicts with the base's predictions in float32, token by token; and, second, the KL
    divergence of the dequantized weights on the same tokens.

    What sets the two apart is that llama.cpp rounds activations, and counts in lower precision. Raises LowbitError
    subclasses.
    """
    checkpoint = open_checkpoint(base)
    tokens = first_windows(dataset, load_tokenizer(checkpoint), windows, context)
    place = pick_device(device)
    dense = StreamedModel(GgufCheckpoint(Path(file), checkpoint.config, torch.float32), place, torch.float32)
    with embedded_server(Path(file), context + 8) as address:
        found = measure_served(
            Endpoint(address),
            StreamedModel(checkpoint, place, torch.float32),
            dense,
            tokens,
            progress or Silent(),
            listed=LISTED,
        )
    assert found.dense_kl is not None
    return found, found.dense_kl
