"""The one evaluator that every row of a benchmark goes through. It knows nothing of who made the weights.

Base and candidate run in float32 on the same held-out windows; the numbers are means over tokens, their ± is the
standard error over windows (tokens of one window are not independent, windows nearly are).
"""

from __future__ import annotations

import math
import re
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
    for window in windows.to(base.device):
        with torch.inference_mode():
            expected, got = (model(window[None]).logits[0, :-1].float().log_softmax(-1) for model in (base, candidate))
            losses.append(-got.gather(1, window[1:, None]).mean().item())
            divergences.append((expected.exp() * (expected - got)).sum(-1).mean().item())
            agreements.append((expected.argmax(-1) == got.argmax(-1)).float().mean().item())
    loss, loss_error = _mean(losses)
    kl, kl_error = _mean(divergences)
    return Quality(math.exp(loss), math.exp(loss) * loss_error, kl, kl_error, _mean(agreements)[0])


def runnable_model(artifact: Path, base: Path) -> Any:
    """What `evaluate` takes of a directory or a GGUF file made of `base`: dequantized weights in float32, and where activations
    are quantized too, inputs of those layers rounded as the runtime would round them. Raises SystemExit for activation
    schemes that are not simulated here."""
    if artifact.is_file():
        return dense_model(artifact, base)
    model = dense_model(artifact)
    config = read_config(artifact).get("quantization_config", {})
    for group in config.get("config_groups", {}).values():
        inputs = group.get("input_activations")
        if not inputs:
            continue
        if inputs.get("strategy") != "token" or inputs.get("dynamic") is not True:
            raise SystemExit(f"{artifact}: activations {inputs.get('strategy')} are not simulated")
        rounded = _int8_tokens if inputs["type"] == "int" else _fp8_tokens
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and not _left_out(name, config["ignore"]):
                module.register_forward_pre_hook(lambda _, args, rounded=rounded: (rounded(args[0]), *args[1:]))
    return model


def _left_out(name: str, patterns: list[str]) -> bool:
    return any(re.search(pattern[3:], name) if pattern.startswith("re:") else name == pattern for pattern in patterns)


def _int8_tokens(inputs: Tensor) -> Tensor:
    """Every token on its own int8 grid, symmetric."""
    scale = inputs.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
    return (inputs / scale).round().clamp(-128, 127) * scale


def _fp8_tokens(inputs: Tensor) -> Tensor:
    """Every token scaled to the range of float8_e4m3fn."""
    scale = inputs.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 448
    return (inputs / scale).to(torch.float8_e4m3fn).float() * scale


def _mean(values: list[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, float("nan")
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))
