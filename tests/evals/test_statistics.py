"""Against scipy and brute force."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lowbit.evals.statistics import (
    bootstrap_interval,
    mcnemar,
    paired,
    paired_proportions_interval,
    pareto_front,
    pooled_error,
    recovery_percent,
    standard_error,
    verdict,
    worst_verdict,
)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_exact_binomial_test(only_base: int, only_other: int) -> None:
    n = only_base + only_other
    expected = stats.binomtest(only_base, n, 0.5).pvalue if n else 1.0
    assert mcnemar(only_base, only_other) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_by_counting_every_outcome() -> None:
    outcomes = [sum(sides) for sides in itertools.product((0, 1), repeat=9)]
    share = sum(abs(heads - 4.5) >= abs(2 - 4.5) for heads in outcomes) / len(outcomes)
    assert mcnemar(7, 2) == pytest.approx(share)


def test_mcnemar_of_many_items() -> None:
    assert mcnemar(2600, 2400) == pytest.approx(stats.binomtest(2600, 5000, 0.5).pvalue, rel=1e-7)


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=40))
def test_standard_error_is_scipys(values: list[float]) -> None:
    assert standard_error(values) == pytest.approx(float(stats.sem(values)), abs=1e-12)


def test_pooled_error_is_lm_evals() -> None:
    metrics = pytest.importorskip("lm_eval.api.metrics")
    errors, sizes = [0.03, 0.05, 0.01], [100, 57, 400]
    assert pooled_error(errors, sizes) == pytest.approx(metrics.pooled_sample_stderr(errors, sizes))


def test_bootstrap_agrees_with_plain_resampling_and_covers() -> None:
    rng = np.random.default_rng(1)
    differences = rng.choice([-1.0, 0.0, 1.0], size=300, p=[0.1, 0.85, 0.05])
    means = [rng.choice(differences, size=300).mean() for _ in range(4000)]
    low, high = bootstrap_interval(differences.tolist())
    assert low == pytest.approx(np.quantile(means, 0.025), abs=0.004)
    assert high == pytest.approx(np.quantile(means, 0.975), abs=0.004)
    covered = 0
    for trial in range(200):
        sample = rng.choice([-1.0, 0.0, 1.0], size=200, p=[0.2, 0.7, 0.1])
        low, high = bootstrap_interval(sample.tolist(), seed=trial)
        covered += low <= -0.1 <= high
    assert 176 <= covered <= 199


@pytest.mark.parametrize(("n", "worse", "better"), [(20, 0.1, 0.1), (60, 0.15, 0.02), (400, 0.03, 0.05)])
def test_interval_of_paired_proportions_covers(n: int, worse: float, better: float) -> None:
    rng = np.random.default_rng(n)
    draws = rng.multinomial(n, [worse, better, 1 - worse - better], size=3000)
    covered = 0
    for only_base, only_other, _ in draws.tolist():
        low, high = paired_proportions_interval(only_base, only_other, n)
        covered += low <= better - worse <= high
    assert 0.93 <= covered / 3000 <= 0.99


def test_no_change_among_few_items_is_no_certainty() -> None:
    low, high = paired_proportions_interval(0, 0, 8)
    assert low == -high
    assert 0.1 < high < 0.3


def test_paired_binary() -> None:
    base = [1.0] * 50 + [0.0] * 50
    other = [1.0] * 40 + [0.0] * 10 + [1.0] * 4 + [0.0] * 46
    result = paired(other, base)
    assert result.difference == pytest.approx(-0.06)
    assert result.flips == pytest.approx(0.14)
    assert result.recovery == pytest.approx(88.0)
    assert result.p_value == pytest.approx(stats.binomtest(4, 14, 0.5).pvalue)
    assert result.low < -0.06 < result.high
    assert result.verdict == "indistinguishable"


def test_flips_without_a_difference() -> None:
    assert paired([1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 1.0, 0.0]).flips == 0.5
    assert paired([1.0, 0.0], [1.0, 0.0]).p_value == 1.0


def test_paired_numbers_use_the_normal_test() -> None:
    rng = random.Random(0)
    base = [rng.gauss(3, 1) for _ in range(400)]
    other = [value + rng.gauss(0.1, 0.3) for value in base]
    result = paired(other, base, higher_is_better=False)
    assert result.p_value == pytest.approx(stats.ttest_rel(other, base).pvalue, rel=0.3)
    assert result.verdict in ("small loss", "significant loss")
    with pytest.raises(ValueError, match="2 items against 1"):
        paired([1.0, 2.0], [1.0])


@pytest.mark.parametrize(
    ("gain", "p", "recovery", "word"),
    [
        (-0.2, 0.2, 60.0, "indistinguishable"),
        (0.1, 0.01, 105.0, "better"),
        (-0.001, 0.01, 99.5, "small loss"),
        (-0.02, 0.01, 95.0, "significant loss"),
        (-0.3, 0.001, 60.0, "broken"),
    ],
)
def test_verdicts(gain: float, p: float, recovery: float, word: str) -> None:
    assert verdict(gain, p, recovery) == word


def test_worst_verdict() -> None:
    assert worst_verdict(["better", "small loss", "indistinguishable"]) == "small loss"
    assert worst_verdict([]) == ""


def test_recovery() -> None:
    assert recovery_percent(44.8, 45.3) == pytest.approx(98.896, abs=1e-3)
    assert recovery_percent(12.0, 10.0, higher_is_better=False) == pytest.approx(83.333, abs=1e-3)
    assert recovery_percent(0.0, 0.0) == 100.0


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12))
def test_pareto_front_by_brute_force(points: list[tuple[int, int]]) -> None:
    front = pareto_front([(float(c), float(m)) for c, m in points])
    for (cost, merit), on in zip(points, front, strict=True):
        beaten = any(c <= cost and m >= merit and (c, m) != (cost, merit) for c, m in points)
        assert on == (not beaten)
