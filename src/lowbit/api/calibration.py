"""The token windows that a run calibrates on, and those that it is measured on: what every kind of quantization shares."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.core.contracts import Checkpoint
from lowbit.core.errors import CalibrationError, RecipeError
from lowbit.core.progress import Progress
from lowbit.core.text import first_windows, token_windows
from lowbit.core.tokenizer import load_tokenizer
from lowbit.pipeline.self_sampling import CALIBRATION_FILE, Sampling, Shelves, kept_samples
from lowbit.recipe import Calibration

VERIFY_WINDOWS, VERIFY_CONTEXT = 8, 512


def calibration_windows(
    checkpoint: Checkpoint, wanted: Calibration, device: torch.device, shelves: Shelves, progress: Progress
) -> Tensor:
    """[num_samples, seq_len] int64, text first. What the model has to write itself ("self") is kept for a
    continued run and for others.

    checkpoint: read as dense weights. Raises RecipeError for windows longer than the model's positions, CalibrationError
    for too little text.
    """
    longest = int(checkpoint.config.get("max_position_embeddings") or wanted.seq_len)
    if wanted.seq_len > longest:
        raise RecipeError(
            f"--seq-len {wanted.seq_len} is longer than the {longest} positions this model has",
            hint=f"--seq-len {longest}",
        )
    texts = [part for part in wanted.dataset.split("+") if part != "self"]
    sampled = sampled_windows(wanted)
    windows = []
    if texts:
        tokenizer, count = load_tokenizer(checkpoint), wanted.num_samples - sampled
        windows.append(token_windows("+".join(texts), tokenizer, count, wanted.seq_len, wanted.seed))
    if sampled:
        sampling = Sampling(sampled, wanted.seq_len, wanted.seed)
        windows.append(kept_samples(sampling, CALIBRATION_FILE, shelves, checkpoint, device, progress))
    return torch.cat(windows)


def sampled_windows(wanted: Calibration) -> int:
    """How many of the windows the model writes itself: the last ones."""
    parts = wanted.dataset.split("+")
    return round(wanted.num_samples * parts.count("self") / len(parts))


def held_out_windows(checkpoint: Checkpoint, seen: Calibration) -> Tensor:
    """Windows that calibration did not see, of Python's reference text."""
    tokenizer = load_tokenizer(checkpoint)
    if "pydoc" in seen.dataset.split("+"):
        try:
            every = token_windows("pydoc", tokenizer, seen.num_samples + VERIFY_WINDOWS, seen.seq_len, seen.seed)
            return every[seen.num_samples :, :VERIFY_CONTEXT]
        except CalibrationError:  # too little of it is left
            pass
    return first_windows("pydoc", tokenizer, VERIFY_WINDOWS, VERIFY_CONTEXT)
