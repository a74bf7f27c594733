"""The model under test as lm-eval wants it: dense weights in transformers, in this process."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lowbit.core.contracts import Checkpoint
from lowbit.core.streamed_model import StreamedModel
from lowbit.evals.tasks.packed_scores import heeds_packing, packed_scores

# tokens of a packed row for each prompt that a batch would hold
_ROW_TOKENS = 128


@contextmanager
def transformers_engine(
    checkpoint: Checkpoint,
    tokenizer: Any,
    device: torch.device,
    dtype: torch.dtype,
    *,
    batch_size: int,
    packed: bool = False,
) -> Iterator[Any]:
    """lm-eval's own HFLM around a checkpoint's dense weights, in memory for as long as the context lasts.

    packed: what prompts have in common is computed once where the model allows it. Scores are the same but for rounding,
    which 16 bits may show.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.models.huggingface import HFLM

    class Quiet(HFLM):  # type: ignore[misc]  # lm-eval is not typed
        """Without progress bars of its own."""

        packs: bool | None = None if packed else False

        def _loglikelihood_tokens(
            self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
        ) -> list[tuple[float, bool]]:
            pairs = [(context, continuation) for _, context, continuation in requests]
            if self.packs is None:
                self.packs = heeds_packing(self.model, pairs, self.max_length)
            if not self.packs:
                plain: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, True, override_bs)
                return plain
            return packed_scores(self.model, pairs, longest=self.max_length, row_tokens=_ROW_TOKENS * batch_size)

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().generate_until(requests, disable_tqdm=True)

    with torch.no_grad(), StreamedModel(checkpoint, device, dtype).whole() as whole:
        yield Quiet(pretrained=whole, tokenizer=tokenizer, batch_size=batch_size)
