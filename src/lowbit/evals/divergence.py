"""Perplexity of a model, and how far another one has moved from it, in bounded memory.

Both models are streamed block by block over the same token windows; logits are compared a slice of tokens at a time.
KL is that of the base's next-token distribution from the candidate's, in nats, averaged over all predicted tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit.core.errors import VerificationError
from lowbit.core.progress import Progress
from lowbit.core.streamed_model import StreamedModel

_SLICE_TOKENS = 512
_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Measurement:
    """What was measured over `tokens` predicted tokens in `windows` windows of `context` tokens.

    perplexity with its standard error; against the base: KL in nats (mean, standard error, median, 99th and 99.9th
    percentile) and top-1 agreement with its standard error. The base fields are None for a model on its own.
    """

    windows: int
    context: int
    tokens: int
    perplexity: float
    perplexity_error: float
    base_perplexity: float | None = None
    kl: float | None = None
    kl_error: float | None = None
    kl_median: float | None = None
    kl_p99: float | None = None
    kl_p999: float | None = None
    top1: float | None = None
    top1_error: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields that were measured."""
        return {name: value for name, value in self.__dict__.items() if value is not None}


def measure(
    candidate: StreamedModel, windows: Tensor, progress: Progress, *, base: StreamedModel | None = None
) -> Measurement:
    """Measure a model on token windows [windows, context], and against `base` when it is given.

    Raises VerificationError when the logits hold NaN or infinity.
    """
    models = [candidate] if base is None else [base, candidate]
    progress.start("measure", sum(len(model.blocks) for model in models) + len(windows))
    states = [_last_states(model, windows, progress) for model in models]
    totals = _Totals()
    with torch.no_grad(), _all_outside(models):
        for index, window in enumerate(windows):
            for start in range(0, len(window) - 1, _SLICE_TOKENS):
                stop = min(start + _SLICE_TOKENS, len(window) - 1)
                targets = window[start + 1 : stop + 1].to(candidate.device)
                log_probs = [
                    _log_probs(model, hidden[index, start:stop]) for model, hidden in zip(models, states, strict=True)
                ]
                totals.add(log_probs, targets)
            progress.advance()
    return totals.measurement(*windows.shape)


def _last_states(model: StreamedModel, windows: Tensor, progress: Progress) -> Tensor:
    """Hidden states after the last block [windows, context, hidden], on the CPU."""
    batch = max(1, _BATCH_TOKENS // windows.shape[1])
    batches = windows.split(batch)
    with torch.no_grad():
        with model.outside():
            states = torch.cat([model.embed(ids).cpu() for ids in batches])
        for index in range(len(model.blocks)):
            with model.block(index) as block:
                for start in range(0, len(windows), batch):
                    part = states[start : start + batch]
                    states[start : start + batch] = model.run_block(index, block, part.to(model.device)).cpu()
            progress.advance()
    return states


class _all_outside:  # noqa: N801 - reads as a statement
    """Everything but the blocks of several models, loaded together."""

    def __init__(self, models: Sequence[StreamedModel]) -> None:
        self.contexts = [model.outside() for model in models]

    def __enter__(self) -> None:
        for context in self.contexts:
            context.__enter__()

    def __exit__(self, *error: Any) -> None:
        for context in self.contexts:
            context.__exit__(*error)


def _log_probs(model: StreamedModel, hidden: Tensor) -> Tensor:
    logits = model.logits(hidden[None].to(model.device))[0].float()
    if not torch.isfinite(logits).all():
        raise VerificationError("the model's logits hold NaN or infinity: it is broken")
    return logits.log_softmax(-1)


class _Totals:
    """Per-token values of all slices: a few floats a token, whatever the vocabulary."""

    def __init__(self) -> None:
        self.nll: list[list[Tensor]] = []
        self.kl: list[Tensor] = []
        self.agree: list[Tensor] = []

    def add(self, log_probs: Sequence[Tensor], targets: Tensor) -> None:
        self.nll.append([-log.gather(1, targets[:, None])[:, 0].cpu() for log in log_probs])
        if len(log_probs) == 2:
            base, candidate = log_probs
            self.kl.append((base.exp() * (base - candidate)).sum(-1).cpu())
            self.agree.append((base.argmax(-1) == candidate.argmax(-1)).float().cpu())

    def measurement(self, windows: int, context: int) -> Measurement:
        columns = [torch.cat(column).double() for column in zip(*self.nll, strict=True)]
        nll = columns[-1]
        perplexity = math.exp(nll.mean().item())
        result: dict[str, Any] = {
            "windows": windows,
            "context": context,
            "tokens": len(nll),
            "perplexity": perplexity,
            "perplexity_error": perplexity * _standard_error(nll),
        }
        if self.kl:
            kl, agree = torch.cat(self.kl).double(), torch.cat(self.agree).double()
            result |= {
                "base_perplexity": math.exp(columns[0].mean().item()),
                "kl": kl.mean().item(),
                "kl_error": _standard_error(kl),
                "kl_median": kl.median().item(),
                "kl_p99": kl.quantile(0.99).item(),
                "kl_p999": kl.quantile(0.999).item(),
                "top1": agree.mean().item(),
                "top1_error": _standard_error(agree),
            }
        return Measurement(**result)


def _standard_error(values: Tensor) -> float:
    return (values.std() / math.sqrt(len(values))).item() if len(values) > 1 else 0.0
