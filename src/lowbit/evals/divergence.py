"""Perplexity of a model, and how far another one has moved from it, in bounded memory.

Both models are streamed block by block over the same token windows; logits are compared a slice of tokens at a time.
KL is that of the base's next-token distribution from the candidate's, in nats, averaged over all predicted tokens.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.core.errors import VerificationError
from lowbit.core.progress import Progress
from lowbit.core.streamed_model import StreamedModel
from lowbit.evals.state_cache import cached_states, fresh_states

_SLICE_TOKENS = 512
_WORST = 40
_LOWEST, _HIGHEST, _BINS = -8.0, 2.0, 40
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


@dataclass(frozen=True)
class WorstToken:
    """A prediction that moved far: where, by how much (nats), and both models' first choices with their probabilities."""

    window: int
    position: int
    kl: float
    base_choice: int
    base_probability: float
    choice: int
    probability: float


@dataclass(frozen=True)
class Details:
    """Beyond the means. histogram: counts of tokens by log10 of their KL, `_BINS` bins of equal width from `low` to `high`,
    what is beyond counted in the outer ones. worst: the tokens with the largest KL."""

    measurement: Measurement
    low: float
    high: float
    histogram: list[int]
    worst: list[WorstToken]


def measure(
    candidate: StreamedModel,
    windows: Tensor,
    progress: Progress,
    *,
    base: StreamedModel | None = None,
    cache: Path | None = None,
) -> Measurement:
    """Measure a model on token windows [windows, context], and against `base` when it is given.

    cache: a directory for the base's last hidden states; the next artifact on the same tokens then costs no base pass.
    Raises VerificationError when the logits hold NaN or infinity.
    """
    return measure_details(candidate, windows, progress, base=base, cache=cache).measurement


def measure_details(
    candidate: StreamedModel,
    windows: Tensor,
    progress: Progress,
    *,
    base: StreamedModel | None = None,
    cache: Path | None = None,
) -> Details:
    """`measure`, with the distribution over tokens and the worst of them."""
    models = [candidate] if base is None else [base, candidate]
    itself = base is not None and _same(base, candidate)  # one pass tells both
    progress.start("measure", sum(len(model.blocks) for model in models[: 1 if itself else 2]) + len(windows))
    states: list[Tensor] = []
    for model in models:
        fill = functools.partial(_last_states, model, windows, progress)
        if itself and states:
            states.append(states[0])
        elif model is base and cache is not None:
            kept, known = cached_states(cache, model, windows, fill)
            states.append(kept)
            for _ in model.blocks if known else ():
                progress.advance()
        else:
            states.append(fresh_states(model, windows))
            fill(states[-1])
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
    return totals.details(*windows.shape)


def _same(one: StreamedModel, other: StreamedModel) -> bool:
    return one.checkpoint.identity() == other.checkpoint.identity() and (one.dtype, one.device) == (
        other.dtype,
        other.device,
    )


def _last_states(model: StreamedModel, windows: Tensor, progress: Progress, states: Tensor) -> None:
    """Put the hidden states after the last block into `states` [windows, context, hidden], on the CPU."""
    batch = max(1, _BATCH_TOKENS // windows.shape[1])
    with torch.no_grad():
        with model.outside():
            for start in range(0, len(windows), batch):
                states[start : start + batch] = model.embed(windows[start : start + batch]).cpu()
        for index in range(len(model.blocks)):
            with model.block(index) as block:
                for start in range(0, len(windows), batch):
                    part = states[start : start + batch]
                    states[start : start + batch] = model.run_block(index, block, part.to(model.device)).cpu()
            progress.advance()


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
    if not torch.isfinite(logits.sum(-1)).all():  # one NaN or infinity is enough, and isfinite of all takes longer
        raise VerificationError("the model's logits hold NaN or infinity: it is broken")
    return logits.log_softmax(-1)


class _Totals:
    """Per-token values of all slices: a few floats a token, whatever the vocabulary."""

    def __init__(self) -> None:
        self.nll: list[list[Tensor]] = []
        self.kl: list[Tensor] = []
        self.agree: list[Tensor] = []
        self.choices: list[Tensor] = []  # [2, tokens], base first
        self.chosen: list[Tensor] = []  # their probabilities

    def add(self, log_probs: Sequence[Tensor], targets: Tensor) -> None:
        self.nll.append([-log.gather(1, targets[:, None])[:, 0].cpu() for log in log_probs])
        if len(log_probs) == 2:
            base, candidate = log_probs
            self.kl.append((base.exp() * (base - candidate)).sum(-1).cpu())
            tops = [log.max(-1) for log in log_probs]
            self.agree.append((tops[0].indices == tops[1].indices).float().cpu())
            self.choices.append(torch.stack([top.indices for top in tops]).int().cpu())
            self.chosen.append(torch.stack([top.values for top in tops]).exp().cpu())

    def details(self, windows: int, context: int) -> Details:
        measurement = self.measurement(windows, context)
        if not self.kl:
            return Details(measurement, _LOWEST, _HIGHEST, [], [])
        kl = torch.cat(self.kl)
        logs = kl.clamp_min(1e-30).log10().clamp(_LOWEST, _HIGHEST - 1e-6)
        histogram = torch.histc(logs, _BINS, _LOWEST, _HIGHEST).int().tolist()
        choices, chosen = torch.cat(self.choices, 1), torch.cat(self.chosen, 1)
        worst = [
            WorstToken(
                index // (context - 1), index % (context - 1), kl[index].item(),
                int(choices[0, index]), chosen[0, index].item(), int(choices[1, index]), chosen[1, index].item(),
            )
            for index in kl.topk(min(_WORST, len(kl))).indices.tolist()
        ]  # fmt: skip
        return Details(measurement, _LOWEST, _HIGHEST, histogram, worst)

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
