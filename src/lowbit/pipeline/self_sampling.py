"""Calibration text that the model writes itself (`--dataset self`): no data set needed, and the model's own distribution.

LLM-QAT (Liu et al. 2023) samples its training text this way. The whole model has to be in memory for it, since every
token needs all blocks; a model that does not fit needs a text.

What a model wrote is kept for later runs on this machine: it takes minutes, and other methods of the same model ask for the
same text.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lowbit.core.contracts import Checkpoint
from lowbit.core.errors import CalibrationError, OutputError
from lowbit.core.hardware import calibration_dtype, free_memory_on
from lowbit.core.progress import Progress
from lowbit.core.scheme import DTYPES
from lowbit.core.streamed_model import StreamedModel
from lowbit.core.text import windows_digest
from lowbit.pipeline.writer import save_tensors

# documents are short and many are sampled at once: a token costs one pass through the model however many run beside it
_DOCUMENT = 256
_TOGETHER = 4096
# not cuDNN's, which PyTorch takes first on Hopper: it plans anew for every number of tokens that it has not seen (14 of 16
# seconds on an H200 for documents of 256), and deterministic algorithms that others may be without do not exclude it
_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# in the directory of an unfinished artifact: what calibration uses, and what the last pass does besides
CALIBRATION_FILE, TUNING_FILE = "self-sampled.safetensors", "self-sampled-more.safetensors"


@dataclass(frozen=True)
class Sampling:
    """count windows of `length` tokens. begun: [windows, tokens] int64 of a text; half of the documents then go on from a
    passage of it, a quarter as long as they are."""

    count: int
    length: int
    seed: int
    begun: Tensor | None = None


@dataclass(frozen=True)
class Shelves:
    """Directories of text that models wrote: of an unfinished artifact, and for every later run on this machine."""

    work: Path
    texts: Path


def kept_samples(
    wanted: Sampling, name: str, shelves: Shelves, checkpoint: Checkpoint, device: torch.device, progress: Progress
) -> Tensor:
    """`sample_windows`, or what is there of them: as the file `name` where an earlier try at the same artifact put them, or on
    the machine's shelf. Both have them afterwards, that shelf unless it cannot be written.

    Raises CalibrationError as `sample_windows`, and OutputError where the file cannot be written.
    """
    file = shelves.work / name
    windows = _read(file, wanted)
    if windows is not None:
        return windows
    shelved = shelves.texts / f"{_key(wanted, checkpoint, device)}.safetensors"
    windows = _read(shelved, wanted)
    if windows is None:
        windows = sample_windows(wanted, checkpoint, device, progress)
        with contextlib.suppress(OutputError, OSError):
            _put(shelved, windows)
    save_tensors(file, {"windows": windows})
    return windows


def _read(file: Path, wanted: Sampling) -> Tensor | None:
    try:
        windows = load_file(file)["windows"].long()
    except (OSError, SafetensorError, KeyError):
        return None
    return windows if windows.shape == (wanted.count, wanted.length) else None


def _put(file: Path, windows: Tensor) -> None:
    """Whole or not at all, also when two runs come to it at once."""
    own = file.with_name(f"{file.stem}.{os.getpid()}.safetensors")
    save_tensors(own, {"windows": windows.int()})
    own.replace(file)


def _key(wanted: Sampling, checkpoint: Checkpoint, device: torch.device) -> str:
    """A hash of all that decides what is written: the file's name on the shelf."""
    begun = "" if wanted.begun is None else windows_digest(wanted.begun)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    versions = torch.__version__, version("transformers")
    parts = (checkpoint.identity(), wanted.count, wanted.length, wanted.seed, begun, _DOCUMENT, machine, *versions)
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:40]


def remove_samples(directory: Path) -> None:
    """Drop the windows of a finished artifact."""
    for name in (CALIBRATION_FILE, TUNING_FILE):
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
    batches = [part for start in starts for part in torch.split(start, batch)]
    progress.start("sample", len(batches))
    with torch.random.fork_rng(), sdpa_kernel(_ATTENTION), model.whole() as network:
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
