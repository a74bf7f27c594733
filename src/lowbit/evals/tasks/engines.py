"""The model under test as lm-eval wants it: dense weights in transformers, in this process."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lowbit.core.contracts import Checkpoint
from lowbit.core.streamed_model import StreamedModel


@contextmanager
def transformers_engine(
    checkpoint: Checkpoint, tokenizer: Any, device: torch.device, dtype: torch.dtype, *, batch_size: int
) -> Iterator[Any]:
    """lm-eval's own HFLM around a checkpoint's dense weights, in memory for as long as the context lasts."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.models.huggingface import HFLM

    class Quiet(HFLM):  # type: ignore[misc]  # lm-eval is not typed
        """Without progress bars of its own."""

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().generate_until(requests, disable_tqdm=True)

    with torch.no_grad(), StreamedModel(checkpoint, device, dtype).whole() as whole:
        yield Quiet(pretrained=whole, tokenizer=tokenizer, batch_size=batch_size)
