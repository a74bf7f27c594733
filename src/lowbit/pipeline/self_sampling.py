"""Calibration text that the model writes itself (`--dataset self`): no data set needed, and the model's own distribution.

LLM-QAT (Liu et al. 2023) samples its training text this way. The whole model has to be in memory for it, since every
token needs all blocks; a model that does not fit needs a text.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.core.contracts import Checkpoint
from lowbit.core.errors import CalibrationError
from lowbit.core.hardware import calibration_dtype
from lowbit.core.progress import Progress
from lowbit.core.scheme import DTYPES
from lowbit.core.streamed_model import StreamedModel

_BATCH = 32


def sample_windows(
    checkpoint: Checkpoint, device: torch.device, count: int, length: int, seed: int, progress: Progress
) -> Tensor:
    """[count, length] int64 tokens sampled at temperature 1, each window begun with a random token of the vocabulary.

    Raises CalibrationError when the model does not fit in memory.
    """
    stored = DTYPES.get(str(checkpoint.config.get("dtype")), torch.bfloat16)
    model = StreamedModel(checkpoint, device, calibration_dtype(device, stored))
    _check_memory(model, device)
    generator = torch.Generator().manual_seed(seed)
    vocabulary = int(checkpoint.config["vocab_size"])
    progress.start("sample", -(-count // _BATCH))
    with torch.random.fork_rng(), model.whole() as network:
        torch.manual_seed(seed)
        windows = []
        for start in range(0, count, _BATCH):
            size = min(_BATCH, count - start)
            first = torch.randint(0, vocabulary, (size, 1), generator=generator).to(device)
            ids = network.generate(  # type: ignore[operator]
                first,
                attention_mask=torch.ones_like(first),
                min_new_tokens=length - 1,
                max_new_tokens=length - 1,
                do_sample=True,
                top_k=0,
                pad_token_id=0,
            )
            windows.append(ids.cpu())
            progress.advance()
    return torch.cat(windows)


def _check_memory(model: StreamedModel, device: torch.device) -> None:
    import psutil

    parameters = sum(parameter.numel() for parameter in model.skeleton.parameters())
    need = parameters * model.dtype.itemsize
    free = psutil.virtual_memory().available if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
    if need > 0.8 * free:
        raise CalibrationError(
            f"--dataset self needs the whole model in memory: {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free",
            hint="give a text instead: --dataset pydoc or a file",
        )
