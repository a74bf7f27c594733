"""A GGUF file as the real llama.cpp computes it, against its base: xllamacpp's server, embedded, asked token by token.

The server gives the probabilities of the likeliest tokens only. What is left of both distributions counts as one token
more, so that the divergence is a lower bound; with thousands of tokens it is short of the full one by little.
"""

from __future__ import annotations

import json
import math
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.core.errors import VerificationError
from lowbit.core.progress import Progress

_TIMEOUT = 600.0


@dataclass(frozen=True)
class LlamaCppMeasurement:
    """Over `tokens` predictions: kl in nats with its standard error, over the `listed` likeliest tokens and the rest as
    one; top1: share of predictions with the base's likeliest token."""

    tokens: int
    listed: int
    kl: float
    kl_error: float
    top1: float


def measure_llama_cpp(
    file: Path, windows: Tensor, base_log_probs: Tensor, progress: Progress, *, listed: int = 2000, threads: int = 0
) -> LlamaCppMeasurement:
    """Compare llama.cpp's next-token probabilities with the base's.

    windows: [windows, tokens] int64. base_log_probs: [windows, tokens, vocabulary] float32, natural logarithm.
    Raises VerificationError when xllamacpp is missing, cannot load the file or stops answering.
    """
    progress.start("llama.cpp", windows.numel())
    kls, agree = [], []
    with _server(file, windows.shape[1] + 8, threads) as address:
        for window, expected in zip(windows, base_log_probs, strict=True):
            for position in range(len(window)):
                top = _next(address, window[: position + 1].tolist(), listed)
                kls.append(_divergence(expected[position], top))
                agree.append(float(int(expected[position].argmax()) == int(top[0]["id"])))
                progress.advance()
    kl = torch.tensor(kls, dtype=torch.float64)
    error = (kl.std() / math.sqrt(len(kl))).item() if len(kl) > 1 else 0.0
    return LlamaCppMeasurement(len(kls), listed, kl.mean().item(), error, sum(agree) / len(agree))


def _divergence(base: Tensor, top: list[dict[str, Any]]) -> float:
    ids = torch.tensor([entry["id"] for entry in top])
    q = torch.tensor([entry["logprob"] for entry in top], dtype=torch.float64)
    p = base[ids].double()
    rest_p, rest_q = (1 - p.exp().sum()).clamp_min(1e-9), (1 - q.exp().sum()).clamp_min(1e-9)
    return ((p.exp() * (p - q)).sum() + rest_p * (rest_p / rest_q).log()).item()


@contextmanager
def _server(file: Path, context: int, threads: int) -> Iterator[str]:
    try:
        import xllamacpp
    except ImportError as error:
        raise VerificationError(
            "the embedded llama.cpp is not installed, so the file was not run by it", hint="pip install 'lowbit[gguf]'"
        ) from error
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.warmup = context, 1, False
    if threads:
        params.cpuparams.n_threads = threads
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:
        raise VerificationError(f"llama.cpp could not load {file.name}: {error}") from error
    try:
        yield server.listening_address
    finally:
        del server  # ends its threads


def _next(address: str, tokens: list[int], listed: int) -> list[dict[str, Any]]:
    """The likeliest next tokens, best first, each with "id" and "logprob"."""
    # the probabilities are told of before anything is biased; a token that ends the text, or a part of a character, would
    # be answered without them, so that a letter is made to come next
    question = {
        "prompt": tokens,
        "n_predict": 1,
        "n_probs": listed,
        "logit_bias": [["a", 1e6]],
        "temperature": 0,
        "cache_prompt": True,
    }
    try:
        with urllib.request.urlopen(f"{address}/completion", json.dumps(question).encode(), timeout=_TIMEOUT) as answer:
            top: list[dict[str, Any]] = json.load(answer)["completion_probabilities"][0]["top_logprobs"]
            return top
    except (urllib.error.URLError, TimeoutError, KeyError, IndexError, ValueError) as error:
        raise VerificationError(f"llama.cpp stopped answering: {error}") from error
