"""KL divergence of what a server really predicts from what the base predicts, over the likeliest tokens that it tells of.

What is left of both distributions counts as one token more, so that the divergence is a lower bound, and short of the full
one by the more the fewer tokens are told of: over llama-server's 2,000 by nothing to speak of, over vLLM's 20 by some.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit.core.progress import Progress
from lowbit.core.streamed_model import StreamedModel
from lowbit.evals.tasks.endpoint import Endpoint


@dataclass(frozen=True)
class ServedDivergence:
    """Over `tokens` predictions: kl in nats with its standard error, over the `listed` likeliest tokens and the rest as
    one; top1: share of predictions with the base's likeliest token. dense_kl: of the dequantized weights in float32, over
    the same predictions and the whole vocabulary; what sets the two apart is the server's arithmetic and the list's end."""

    tokens: int
    listed: int
    kl: float
    kl_error: float
    top1: float
    dense_kl: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def measure_served(
    endpoint: Endpoint,
    base: StreamedModel,
    dense: StreamedModel | None,
    windows: Tensor,
    progress: Progress,
    *,
    listed: int,
) -> ServedDivergence:
    """Ask the server about token windows [windows, tokens] and compare with the base. dense: the same artifact's
    dequantized weights. Raises EvaluationError when the server stops answering or gives no log-probabilities."""
    progress.start("served", len(windows))
    kls: list[float] = []
    agree: list[float] = []
    dense_kls: list[float] = []
    models = [base] if dense is None else [base, dense]
    for window, logs in zip(windows, _log_probs(models, windows), strict=True):
        expected = logs[0]
        tops = endpoint.prompt_tops(window.tolist(), listed)
        for position, top in enumerate(tops):
            kls.append(divergence_over(expected[position], top))
            agree.append(float(int(expected[position].argmax()) == max(top, key=top.__getitem__)))
        if dense is not None:
            kl = (expected.exp() * (expected - logs[1])).sum(-1)
            dense_kls += kl[: len(tops)].tolist()
        progress.advance()
    values = torch.tensor(kls, dtype=torch.float64)
    error = (values.std() / math.sqrt(len(values))).item() if len(values) > 1 else 0.0
    mean_dense = math.fsum(dense_kls) / len(dense_kls) if dense_kls else None
    return ServedDivergence(len(kls), listed, values.mean().item(), error, sum(agree) / len(agree), mean_dense)


def divergence_over(base: Tensor, top: Mapping[int, float]) -> float:
    """KL of the base's log-probabilities [vocabulary] from a list of token -> log-probability, the rest as one token."""
    p = base[list(top)].double()
    q = torch.tensor(list(top.values()), dtype=torch.float64)
    rest_p, rest_q = (1 - p.exp().sum()).clamp_min(1e-9), (1 - q.exp().sum()).clamp_min(1e-9)
    return ((p.exp() * (p - q)).sum() + rest_p * (rest_p / rest_q).log()).item()


def _log_probs(models: list[StreamedModel], windows: Tensor) -> Iterator[list[Tensor]]:
    """For each window, every model's [tokens, vocabulary] float32 on the CPU; whole models: for short texts only."""
    from contextlib import ExitStack

    with torch.no_grad(), ExitStack() as stack:
        wholes = [stack.enter_context(model.whole()) for model in models]
        for window in windows:
            yield [
                whole(input_ids=window[None].to(model.device)).logits[0].float().log_softmax(-1).cpu()
                for whole, model in zip(wholes, models, strict=True)
            ]
