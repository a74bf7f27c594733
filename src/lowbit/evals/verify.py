"""The promise: an artifact that lowbit calls done has been read back and is no garbage."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lowbit.core.errors import VerificationError
from lowbit.evals.divergence import Measurement
from lowbit.evals.statistics import recovery_percent

# beyond these a model has lost its language, whatever the scheme: 2-bit GPTQ of a small model stays within them
MAX_KL = 3.0
MIN_TOP1 = 0.15


def check(
    measurement: Measurement,
    errors: Mapping[str, float],
    max_kl: float | None = None,
    min_recovery: float | None = None,
) -> None:
    """Raises VerificationError, naming the worst layers, for a collapse, a KL divergence above `max_kl` (nats), or where
    the base's perplexity over the artifact's is below `min_recovery` percent."""
    kl, top1 = measurement.kl, measurement.top1
    if kl is None or top1 is None or not math.isfinite(kl):
        raise VerificationError("the artifact's divergence from its base is not a number", hint=_worst(errors))
    limit = MAX_KL if max_kl is None else max_kl
    if kl > limit or (max_kl is None and top1 < MIN_TOP1):
        raise VerificationError(
            f"the artifact does not speak like its base: KL divergence {kl:.4f} nats (limit {limit:g}), "
            f"top-1 agreement {top1:.1%}; it was not kept",
            hint=f"{_worst(errors)}; use more bits, a smaller --group-size, --zero-point or more calibration text",
        )
    if min_recovery is not None and measurement.base_perplexity is not None:
        recovery = recovery_percent(measurement.perplexity, measurement.base_perplexity, higher_is_better=False)
        if recovery < min_recovery:
            raise VerificationError(
                f"the artifact keeps {recovery:.2f}% of its base (perplexity {measurement.base_perplexity:.3f} became "
                f"{measurement.perplexity:.3f}), {min_recovery:g}% was asked for; it was not kept",
                hint=f"{_worst(errors)}; --fallback tries the next better scheme",
            )


def _worst(errors: Mapping[str, float]) -> str:
    worst = sorted(errors, key=lambda path: errors[path], reverse=True)[:3]
    return "worst layers: " + ", ".join(f"{path} (error {errors[path]:.3f})" for path in worst)
