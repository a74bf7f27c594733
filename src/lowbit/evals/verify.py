"""The promise: an artifact that lowbit calls done has been read back and is no garbage."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lowbit.core.errors import VerificationError
from lowbit.evals.divergence import Measurement

# beyond these a model has lost its language, whatever the scheme: 2-bit GPTQ of a small model stays within them
MAX_KL = 3.0
MIN_TOP1 = 0.15


def check(measurement: Measurement, errors: Mapping[str, float], max_kl: float | None = None) -> None:
    """Raises VerificationError, naming the worst layers, for a collapse or a KL divergence above `max_kl`."""
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


def _worst(errors: Mapping[str, float]) -> str:
    worst = sorted(errors, key=lambda path: errors[path], reverse=True)[:3]
    return "worst layers: " + ", ".join(f"{path} (error {errors[path]:.3f})" for path in worst)
