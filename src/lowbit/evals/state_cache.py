"""A base model's last hidden states on disk, so that ten artifacts cost one pass of the base.

They give the base's full next-token distribution, exact to the last digit, for the cost of the head alone, in hidden_size
floats a token: less than the 2,000 likeliest log-probabilities of a vocabulary would take for most models.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.core.streamed_model import StreamedModel
from lowbit.core.text import windows_digest

KIND = "full distribution, from cached last hidden states"
# states beyond this are kept in a file that the system may page out
_IN_MEMORY = 1 << 30


def cached_states(
    directory: Path, model: StreamedModel, windows: Tensor, compute: Callable[[Tensor], None]
) -> tuple[Tensor, bool]:
    """States [windows, tokens, hidden] of the model's dtype, mapped from a file; (states, whether they were there before).

    compute: fills the tensor that it is given. The file's name is a hash of the checkpoint's identity, the tokens, the
    dtype, the device and torch's version.
    """
    shape = (*windows.shape, _hidden_size(model))
    file = directory / f"{_key(model, windows)}.states"
    count = shape[0] * shape[1] * shape[2]
    if file.is_file() and file.stat().st_size == count * model.dtype.itemsize:
        return _mapped(file, shape, model.dtype), True
    directory.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(dir=directory, suffix=".partial")
    os.close(descriptor)
    try:
        states = _mapped(Path(partial), shape, model.dtype)
        compute(states)
        os.replace(partial, file)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
    return states, False


def fresh_states(model: StreamedModel, windows: Tensor) -> Tensor:
    """Room for states that are not kept: in memory, or beyond a GiB in an unlinked file."""
    shape = (*windows.shape, _hidden_size(model))
    count = shape[0] * shape[1] * shape[2]
    if count * model.dtype.itemsize <= _IN_MEMORY:
        return torch.empty(shape, dtype=model.dtype)
    with tempfile.NamedTemporaryFile(prefix="lowbit-states-") as file:
        return _mapped(Path(file.name), shape, model.dtype)


def _mapped(file: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    count = shape[0] * shape[1] * shape[2]
    return torch.from_file(str(file), shared=True, size=count, dtype=dtype).view(shape)


def _hidden_size(model: StreamedModel) -> int:
    config: Any = model.skeleton.config
    return int((config.get_text_config() if hasattr(config, "get_text_config") else config).hidden_size)


def _key(model: StreamedModel, windows: Tensor) -> str:
    parts = [
        model.checkpoint.identity(),
        windows_digest(windows),
        str(list(windows.shape)),
        str(model.dtype),
        model.device.type,
        torch.__version__,
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:40]
