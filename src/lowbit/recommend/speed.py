"""How fast a model answers: decoding reads all weights once a step, prefill multiplies with them.

A roofline (Williams et al., 2009) with one efficiency for each runtime, which measurements kept on this machine correct:
their geometric mean over the prediction is the correction, their spread its error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lowbit.recommend.hardware import Hardware
from lowbit.recommend.memory import Load, cache_bytes, runtime_constants
from lowbit.recommend.records import BenchRecord
from lowbit.recommend.shape import ModelShape

Basis = Literal["measured", "predicted", "rule"]
_GROUPED = 0.85  # of tensor parallelism's bandwidth, what is left after devices wait for one another


@dataclass(frozen=True)
class Work:
    """What computing a token takes. read: bytes of weights that one token needs. parameters: weights multiplied with."""

    read: float
    parameters: float
    speed: float = 1.0
    double: bool = False


@dataclass(frozen=True)
class Speed:
    """decode: tokens a second of one request; prefill: prompt tokens a second of all together.

    basis: "measured" here with this model and load; "predicted", corrected by `samples` measurements of this runtime here;
    "rule": the general efficiency, never checked here. error: share by which such predictions were off, None if unknown.
    """

    decode: float
    prefill: float
    basis: Basis
    error: float | None = None
    samples: int = 0


def general_speed(work: Work, shape: ModelShape, load: Load, runtime: str, hardware: Hardware) -> Speed:
    """By the general rule. The cache counts half: it is empty at first and full at last."""
    constants = runtime_constants(runtime, hardware.place)
    parallel = hardware.devices * _GROUPED if hardware.devices > 1 and runtime != "llama.cpp" else 1.0
    bandwidth = hardware.bandwidth * constants["decode_efficiency"] * work.speed * parallel
    flops = hardware.flops * constants["prefill_efficiency"] * (1.8 if work.double else 1.0) * parallel
    step = (work.read + cache_bytes(shape, load, runtime) / 2) / bandwidth
    computing = 2 * work.parameters * load.concurrency / flops
    return Speed(1 / (max(step, computing) + constants["step_ms"] / 1000), flops / (2 * work.parameters), "rule")


def predicted_speed(
    general: Speed,
    earlier: Sequence[tuple[BenchRecord, Speed]],
    model: str,
    scheme: str,
    load: Load,
    runtime: str,
    hardware: Hardware,
) -> Speed:
    """The general rule, corrected by what was measured with this runtime on this hardware.

    earlier: measurements with what the general rule says of each.
    """
    own = [pair for pair in earlier if pair[0].runtime == runtime and pair[0].hardware == hardware.id]
    same = [
        record
        for record, _ in own
        if (record.model_id, record.scheme, record.concurrency) == (model, scheme, load.concurrency)
        and abs(record.context - load.context) <= load.context // 4
    ]
    if same:
        newest = max(same, key=lambda record: record.date)
        return Speed(newest.decode_tokens_per_s, newest.prefill_tokens_per_s, "measured", 0.0, len(same))
    if not own:
        return general
    decode = _correction([(record.decode_tokens_per_s, rule.decode) for record, rule in own])
    prefill = _correction([(record.prefill_tokens_per_s, rule.prefill) for record, rule in own])
    error = decode[1] if len(own) > 1 else None
    return Speed(general.decode * decode[0], general.prefill * prefill[0], "predicted", error, len(own))


def _correction(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    """(geometric mean of measured over predicted, mean relative error after leaving each one out in turn)."""
    logs = [math.log(measured / predicted) for measured, predicted in pairs if measured > 0 and predicted > 0]
    if not logs:
        return 1.0, 0.0
    mean = sum(logs) / len(logs)
    others = [(sum(logs) - value) / (len(logs) - 1) for value in logs] if len(logs) > 1 else [mean]
    errors = [abs(math.exp(other - value) - 1) for other, value in zip(others, logs, strict=True)]
    return math.exp(mean), sum(errors) / len(errors)
