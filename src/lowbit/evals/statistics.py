"""What a score is worth: standard errors, paired tests against the base, and a word for the verdict. Pure functions.

Pairing matters: two runs on the same items share the items' difficulty, so that their difference is known far better than
either score. McNemar's test (Psychometrika 1947), exact, asks whether the items that changed sides did so by chance;
"flips" are those items (Dutta et al. 2024, Accuracy is Not All You Need).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_RESAMPLES = 10_000
# below this share of the base's score a model has lost the task, whatever the noise
BROKEN_BELOW = 80.0
# losses beyond this are worth more than a remark
SMALL_LOSS_ABOVE = 98.0

INDISTINGUISHABLE, BETTER, SMALL, SIGNIFICANT, BROKEN = (
    "indistinguishable",
    "better",
    "small loss",
    "significant loss",
    "broken",
)


@dataclass(frozen=True)
class Paired:
    """A score beside the base's on the same `n` items.

    difference: score - base, with its 95% interval `low`..`high`. p_value: that chance alone gives as much. For items that
    are right or wrong these are Agresti and Min's interval and McNemar's exact test, for others a paired bootstrap over
    items and a normal test. flips: share of items that are right in one run only. recovery: percent.
    """

    n: int
    difference: float
    low: float
    high: float
    p_value: float
    flips: float
    recovery: float
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return dict(self.__dict__)


def standard_error(values: Sequence[float]) -> float:
    """Of the mean, from the sample's own spread (n - 1), as lm-eval's mean_stderr; 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    return float(np.std(np.asarray(values, dtype=np.float64), ddof=1) / math.sqrt(len(values)))


def pooled_error(errors: Sequence[float], sizes: Sequence[int]) -> float:
    """Standard error of the mean over several tasks' items, from each task's own, as lm-eval's pooled_sample_stderr."""
    total = sum(sizes)
    if total <= len(sizes):
        return 0.0
    variance = sum((n - 1) * n * error**2 for error, n in zip(errors, sizes, strict=True)) / (total - len(sizes))
    return math.sqrt(variance / total)


def mcnemar(only_base: int, only_other: int) -> float:
    """Exact two-sided p-value for `only_base` items right in the base's run alone and `only_other` in the other alone."""
    n, k = only_base + only_other, min(only_base, only_other)
    if n == 0:
        return 1.0
    logs = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in range(k + 1)]
    return min(1.0, 2 * math.fsum(math.exp(value - n * math.log(2)) for value in logs))


def paired_proportions_interval(only_base: int, only_other: int, n: int, *, z: float = 1.959964) -> tuple[float, float]:
    """Interval (95% by default) of the difference of two shares of the same `n` items: Wald's with half an item added to
    each of the four outcomes (Agresti and Min, Statistics in Medicine 2005), which holds its level for few items and does
    not claim certainty where no item changed sides, as a bootstrap would."""
    b, c, total = only_base + 0.5, only_other + 0.5, n + 2
    centre = (c - b) / total
    error = math.sqrt((b + c) - (c - b) ** 2 / total) / total
    return max(-1.0, centre - z * error), min(1.0, centre + z * error)


def bootstrap_interval(differences: Sequence[float], *, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile interval of the mean of per-item differences, items drawn with replacement; the same for the same seed.

    Equal differences are drawn together (a multinomial over the distinct ones), so that ten thousand items with a few
    outcomes cost no more than a few.
    """
    values, counts = np.unique(np.asarray(differences, dtype=np.float64), return_counts=True)
    n = int(counts.sum())
    rng = np.random.default_rng(seed)
    means = np.concatenate(
        [rng.multinomial(n, counts / n, size=size) @ values / n for size in _batches(_RESAMPLES, len(values))]
    )
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def _batches(total: int, width: int) -> list[int]:
    """Resamples at a time, so that the draws take a few MiB at most."""
    size = max(1, min(total, 2_000_000 // max(width, 1)))
    return [size] * (total // size) + ([total % size] if total % size else [])


def paired(scores: Sequence[float], base: Sequence[float], *, higher_is_better: bool = True, seed: int = 0) -> Paired:
    """Compare per-item scores with the base's on the same items in the same order. Raises ValueError for other lengths."""
    if len(scores) != len(base) or not scores:
        raise ValueError(f"{len(scores)} items against {len(base)}")
    differences = [mine - other for mine, other in zip(scores, base, strict=True)]
    difference = math.fsum(differences) / len(differences)
    binary = set(scores) | set(base) <= {0.0, 1.0}
    worse, better = sum(d < 0 for d in differences), sum(d > 0 for d in differences)
    if binary:
        p_value = mcnemar(worse, better)
        low, high = paired_proportions_interval(worse, better, len(scores))
    else:
        p_value = _normal_p(differences)
        low, high = bootstrap_interval(differences, seed=seed)
    recovery = recovery_percent(
        math.fsum(scores) / len(scores), math.fsum(base) / len(base), higher_is_better=higher_is_better
    )
    signed = difference if higher_is_better else -difference
    return Paired(
        len(scores), difference, low, high, p_value, (worse + better) / len(scores), recovery,
        verdict(signed, p_value, recovery),
    )  # fmt: skip


def _normal_p(differences: Sequence[float]) -> float:
    """Two-sided p-value of a mean difference of nought, by the central limit theorem."""
    error = standard_error(differences)
    if error == 0:
        return 1.0 if not any(differences) else 0.0
    return math.erfc(abs(math.fsum(differences) / len(differences)) / error / math.sqrt(2))


def recovery_percent(score: float, base: float, *, higher_is_better: bool = True) -> float:
    """How much of the base's score is left, in percent; for a perplexity, base / score. 100 for a base of nought."""
    top, bottom = (score, base) if higher_is_better else (base, score)
    if bottom == 0:
        return 100.0
    return 100 * (top / bottom)


def verdict(gain: float, p_value: float, recovery: float, *, alpha: float = 0.05) -> str:
    """A plain word. gain: score - base, turned so that more is better. Losses are named only when chance does not explain
    them (p < alpha): below 80% recovery "broken", below 98% "significant loss", else "small loss"."""
    if p_value >= alpha:
        return INDISTINGUISHABLE
    if gain > 0:
        return BETTER
    if recovery < BROKEN_BELOW:
        return BROKEN
    return SIGNIFICANT if recovery < SMALL_LOSS_ABOVE else SMALL


def worst_verdict(verdicts: Sequence[str]) -> str:
    """The one that a summary should show; "" for none."""
    order = (BETTER, INDISTINGUISHABLE, SMALL, SIGNIFICANT, BROKEN)
    return max(verdicts, key=order.index, default="")


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points no other one beats: (cost, merit), lower cost and higher merit are better; equal points both stay."""
    return [
        not any(
            (cost <= own_cost and merit >= own_merit) and (cost < own_cost or merit > own_merit)
            for cost, merit in points
        )
        for own_cost, own_merit in points
    ]
