"""Calibration text that the model writes itself (`--dataset self`): no data set needed, and the model's own distribution.

LLM-QAT (Liu et al. 2023) samples its training text this way. The whole model has to be in memory for it, since every
token needs all blocks; a model that does not fit needs a text.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from lowbit.core.contracts import Checkpoint
from lowbit.core.errors import CalibrationError
from lowbit.core.hardware import calibration_dtype, free_memory_on
from lowbit.core.progress import Progress
from lowbit.core.scheme import DTYPES
from lowbit.core.streamed_model import StreamedModel
from lowbit.pipeline.writer import save_tensors

# documents are short and many are sampled at once: a token costs one pass through the model however many run beside it
_DOCUMENT = 256
_TOGETHER = 4096
_FILES = {"calibration": "self-sampled.safetensors", "tuning": "self-sampled-more.safetensors"}


@dataclass(frozen=True)
class Sampling:
    """count windows of `length` tokens. begun: [windows, tokens] int64 of a text; half of the documents then go on from a
    passage of it, a quarter as long as they are."""

    count: int
    length: int
    seed: int
    begun: Tensor | None = None


def kept_samples(
    wanted: Sampling,
    directory: Path,
    checkpoint: Checkpoint,
    device: torch.device,
    progress: Progress,
    purpose: Literal["calibration", "tuning"] = "calibration",
) -> Tensor:
    """`sample_windows`, written into a directory, or read from there when an earlier run sampled them already."""
    file = directory / _FILES[purpose]
    if file.exists():
        windows = load_file(file)["windows"]
        if windows.shape == (wanted.count, wanted.length):
            return windows
    windows = sample_windows(wanted, checkpoint, device, progress)
    save_tensors(file, {"windows": windows})
    return windows


def remove_samples(directory: Path) -> None:
    """Drop the windows of a finished artifact."""
    for name in _FILES.values():
        (directory / name).unlink(missing_ok=True)


def sample_windows(wanted: Sampling, checkpoint: Checkpoint, device: torch.device, progress: Progress) -> Tensor:
    """[count, length] int64: documents of up to 256 tokens sampled at temperature 1, each begun with a random token of
    the vocabulary or a passage, packed one after the other.

    Raises CalibrationError when the model does not fit in memory.
    """
    stored = DTYPES.get(str(checkpoint.config.get("dtype")), torch.bfloat16)
    model = StreamedModel(checkpoint, device, calibration_dtype(device, stored))
    document = min(_DOCUMENT, wanted.length)
    total = -(-wanted.count * wanted.length // document)
    batch = min(total, _check_memory(model, device, document))
    starts = _starts(wanted, total, document, int(checkpoint.config["vocab_size"]))
    batches = [part for start in starts for part in start.split(batch)]
    progress.start("sample", len(batches))
    with torch.random.fork_rng(), model.whole() as network:
        torch.manual_seed(wanted.seed)
        documents = []
        for first in batches:
            first = first.to(device)
            ids = network.generate(  # type: ignore[operator]  # transformers' mixin, declared without self's type
                first,
                attention_mask=torch.ones_like(first),
                min_new_tokens=document - first.shape[1],
                max_new_tokens=document - first.shape[1],
                do_sample=True,
                top_k=0,
                pad_token_id=0,
            )
            documents.append(ids.cpu())
            progress.advance()
    return torch.cat(documents).flatten()[: wanted.count * wanted.length].view(wanted.count, wanted.length)


def _starts(wanted: Sampling, documents: int, length: int, vocabulary: int) -> list[Tensor]:
    """What so many documents of `length` tokens begin with: [n, 1] random tokens, and [m, tokens] passages of a text."""
    generator = torch.Generator().manual_seed(wanted.seed)
    going_on = 0 if wanted.begun is None else documents // 2
    tokens = torch.randint(0, vocabulary, (documents - going_on, 1), generator=generator)
    if wanted.begun is None or not going_on:
        return [tokens]
    return [tokens, _passages(wanted.begun, going_on, max(1, length // 4), generator)]


def _passages(text: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """[count, length]: passages from anywhere in [windows, tokens] of text."""
    windows, tokens = text.shape
    length = min(length, tokens)
    which = torch.randint(0, windows, (count, 1), generator=generator)
    where = torch.randint(0, tokens - length + 1, (count, 1), generator=generator)
    return text[which, where + torch.arange(length)]


def _check_memory(model: StreamedModel, device: torch.device, document: int) -> int:
    """How many documents can be sampled at once: their cache takes at most half of what the weights leave free."""
    parameters = sum(parameter.numel() for parameter in model.skeleton.parameters())
    need = parameters * model.dtype.itemsize
    free = free_memory_on(device)
    if need > 0.8 * free:
        raise CalibrationError(
            f"--dataset self needs the whole model in memory: {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free",
            hint="give a text instead: --dataset pydoc or a file",
        )
    # keys and values, and the logits of the last token in float32
    config = model.skeleton.config
    heads = config.num_attention_heads
    width = (getattr(config, "head_dim", None) or config.hidden_size // heads) * (
        getattr(config, "num_key_value_heads", None) or heads
    )
    cache = 2 * len(model.blocks) * width * model.dtype.itemsize * document
    fitting = max(1, int((free - need) / 2 / (cache + 12 * config.vocab_size)))
    # a power of two: what is sampled depends on the number, and should not on a few bytes that are free or not
    return min(_TOGETHER, 1 << (fitting.bit_length() - 1))
