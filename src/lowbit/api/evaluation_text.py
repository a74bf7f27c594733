"""What is measured on a text: perplexity, divergence from the base, the worst tokens in words, and what a server predicts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.api.engines import Answering
from lowbit.core.contracts import Checkpoint
from lowbit.core.progress import Progress
from lowbit.core.streamed_model import StreamedModel
from lowbit.core.text import first_windows, token_windows
from lowbit.evals.divergence import WorstToken, measure_details
from lowbit.evals.served import measure_served
from lowbit.evals.state_cache import KIND
from lowbit.formats.reader import open_artifact

SERVED_WINDOWS, SERVED_CONTEXT = 2, 128


@dataclass(frozen=True)
class Text:
    """Windows of a data set, next to each other. held_out: of a calibration on it (num_samples, seq_len, seed): windows that
    it did not see."""

    dataset: str
    windows: int
    context: int
    held_out: tuple[int, int, int] | None = None

    def tokens(self, tokenizer: Any) -> Tensor:
        """[windows, context] int64. Raises CalibrationError for too short a text."""
        if self.held_out is None:
            return first_windows(self.dataset, tokenizer, self.windows, self.context)
        count, length, seed = self.held_out
        every = token_windows(self.dataset, tokenizer, count + self.windows, length, seed)
        return every[count:, : self.context]


def streamed(checkpoint: Checkpoint, device: torch.device) -> StreamedModel:
    """A checkpoint's dense weights, to compute with in float32."""
    return StreamedModel(open_artifact(checkpoint, torch.float32), device, torch.float32)


def measured_text(
    text: Text,
    tokenizer: Any,
    candidate: StreamedModel | None,
    base: StreamedModel | None,
    states: Path,
    progress: Progress,
) -> dict[str, Any]:
    """What a run holds of a text. candidate: None for a server alone. states: where the base's last hidden states are kept."""
    seen = ", held out of calibration" if text.held_out else ""
    content: dict[str, Any] = {"dataset": text.dataset + seen, "stride": text.context}
    if candidate is None:
        return content
    windows = text.tokens(tokenizer)
    found = measure_details(candidate, windows, progress, base=base, cache=states)
    content |= found.measurement.to_dict()
    if base is not None:
        content |= {
            "base_states": KIND,
            "histogram": {"low": found.low, "high": found.high, "counts": found.histogram},
            "worst": [_in_words(tokenizer, windows, worst) for worst in found.worst],
        }
    return content


def served_text(
    text: Text,
    tokenizer: Any,
    server: Answering,
    candidate: StreamedModel | None,
    base: StreamedModel,
    progress: Progress,
) -> dict[str, Any]:
    """Divergence of a server's own predictions on the first windows of the data set."""
    windows = first_windows(text.dataset, tokenizer, SERVED_WINDOWS, SERVED_CONTEXT)
    return measure_served(server.endpoint, base, candidate, windows, progress, listed=server.listed).to_dict()


def _in_words(tokenizer: Any, windows: Tensor, worst: WorstToken) -> dict[str, Any]:
    ids, at = windows[worst.window].tolist(), worst.position + 1
    words = tokenizer.decode
    return {
        "kl": worst.kl,
        "window": worst.window,
        "position": at,
        "before": words(ids[max(0, at - 24) : at]),
        "token": words(ids[at : at + 1]),
        "after": words(ids[at + 1 : at + 7]),
        "base_choice": words([worst.base_choice]),
        "base_probability": worst.base_probability,
        "choice": words([worst.choice]),
        "probability": worst.probability,
    }
