"""The one evaluator that every row of a benchmark goes through. It knows nothing of who made the weights.

Base and candidate run in float32 on the same held-out windows; the numbers are means over tokens, their ± is the
standard error over windows (tokens of one window are not independent, windows nearly are).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _common import dense_model, read_config
from torch import Tensor


@dataclass(frozen=True)
class Quality:
    """`kl` is KL(base || candidate) in nats a token, `top1` the share of tokens with the same best next token."""

    perplexity: float
    perplexity_error: float
    kl: float
    kl_error: float
    top1: float


def evaluate(base: Any, candidate: Any, windows: Tensor) -> Quality:
    """Two models, token windows [n, length] int64 -> Quality."""
    losses, divergences, agreements = [], [], []
    for window in windows:
        with torch.inference_mode():
            expected, got = (model(window[None]).logits[0, :-1].float().log_softmax(-1) for model in (base, candidate))
            losses.append(-got.gather(1, window[1:, None]).mean().item())
            divergences.append((expected.exp() * (expected - got)).sum(-1).mean().item())
            agreements.append((expected.argmax(-1) == got.argmax(-1)).float().mean().item())
    loss, loss_error = _mean(losses)
    kl, kl_error = _mean(divergences)
    return Quality(math.exp(loss), math.exp(loss) * loss_error, kl, kl_error, _mean(agreements)[0])


def runnable_model(directory: Path) -> Any:
    """What `evaluate` takes: dequantized weights, and where activations are quantized too, transformers' own simulation
    of that in float32."""
    groups = read_config(directory).get("quantization_config", {}).get("config_groups", {})
    if not any(group.get("input_activations") for group in groups.values()):
        return dense_model(directory)
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    config = CompressedTensorsConfig(run_compressed=False)
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, quantization_config=config).eval()


def _mean(values: list[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, float("nan")
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))
