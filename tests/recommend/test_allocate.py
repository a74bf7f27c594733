"""The knapsack against every possible allocation."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.core.errors import RecipeError
from lowbit.recommend.allocate import Choice, allocate

CHOICES = st.lists(st.tuples(st.integers(1, 50), st.floats(0, 10)), min_size=1, max_size=4)


@settings(max_examples=200, deadline=None)
@given(st.lists(CHOICES, min_size=1, max_size=5), st.integers(5, 200))
def test_against_enumeration(sizes: list[list[tuple[int, float]]], budget: int) -> None:
    parts = {
        f"part{i}": [Choice(f"choice{j}", nbytes, cost) for j, (nbytes, cost) in enumerate(choices)]
        for i, choices in enumerate(sizes)
    }
    fitting = [
        sum(choice.cost for choice in combination)
        for combination in itertools.product(*parts.values())
        if sum(choice.nbytes for choice in combination) <= budget
    ]
    if not fitting:
        with pytest.raises(RecipeError, match="smallest"):
            allocate(parts, budget)
        return
    found = allocate(parts, budget)
    assert found.nbytes <= budget
    assert found.bound <= min(fitting) + 1e-6  # a true lower bound
    assert found.cost >= min(fitting) - 1e-6
    # the relaxation is off by at most one part's exchange
    worst = max(choice.cost for choices in parts.values() for choice in choices)
    assert found.cost <= min(fitting) + worst + 1e-6


def test_takes_everything_when_all_fits() -> None:
    parts = {name: [Choice("small", 1, 5.0), Choice("large", 10, 0.5)] for name in "abc"}
    found = allocate(parts, 30)
    assert set(found.chosen.values()) == {"large"}
    assert found.cost == pytest.approx(1.5)
