"""Bit allocation: one choice for each part of a model, least total cost within a number of bytes.

A multiple-choice knapsack. The Lagrangian relaxation (Shoham and Gersho 1988) gives the best choices for a price of a byte;
the price is bisected until the bytes fit, and what is left over is spent greedily. The relaxation's value is a lower bound
of every possible allocation's cost, so how far the answer can be from the best is known and returned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lowbit.core.errors import RecipeError

_BISECTIONS = 60


@dataclass(frozen=True)
class Choice:
    """One way to store a part: its bytes and what it costs (nats of divergence)."""

    name: str
    nbytes: int
    cost: float


@dataclass(frozen=True)
class Allocation:
    """The chosen name of each part; bytes and cost of all; bound: no allocation within the budget costs less."""

    chosen: dict[str, str]
    nbytes: int
    cost: float
    bound: float


def allocate(parts: Mapping[str, Sequence[Choice]], budget: int) -> Allocation:
    """The choices, by part, that cost least within `budget` bytes. Raises RecipeError when not even the smallest fit."""
    smallest = sum(min(choice.nbytes for choice in choices) for choices in parts.values())
    if smallest > budget:
        raise RecipeError(
            f"even the smallest numbers take {smallest / 2**20:.1f} MiB, the budget is {budget / 2**20:.1f} MiB",
            hint=f"at least {-(-smallest // 2**20)} MiB, a shorter --context, or a smaller model",
        )
    low, high = 0.0, _highest_price(parts)
    for _ in range(_BISECTIONS):
        price = (low + high) / 2
        if _bytes(_best(parts, price)) > budget:
            low = price
        else:
            high = price
    best = _best(parts, high)
    # the dual's value at either price bounds every feasible allocation from below
    bound = max(_dual(parts, price, budget) for price in (low, high))
    chosen = _spend(parts, best, budget - _bytes(best))
    cost = sum(choice.cost for choice in chosen.values())
    return Allocation({part: choice.name for part, choice in chosen.items()}, _bytes(chosen), cost, min(bound, cost))


def _best(parts: Mapping[str, Sequence[Choice]], price: float) -> dict[str, Choice]:
    return {
        part: min(choices, key=lambda choice: (choice.cost + price * choice.nbytes, choice.nbytes))
        for part, choices in parts.items()
    }


def _dual(parts: Mapping[str, Sequence[Choice]], price: float, budget: int) -> float:
    return sum(choice.cost + price * choice.nbytes for choice in _best(parts, price).values()) - price * budget


def _highest_price(parts: Mapping[str, Sequence[Choice]]) -> float:
    """A price at which every part takes its smallest choice."""
    steps = [
        (small.cost - choice.cost) / (choice.nbytes - small.nbytes)
        for choices in parts.values()
        for small in [min(choices, key=lambda choice: (choice.nbytes, choice.cost))]
        for choice in choices
        if choice.nbytes > small.nbytes
    ]
    return 2 * max(0.0, *steps, 0.0) + 1e-9


def _spend(parts: Mapping[str, Sequence[Choice]], chosen: Mapping[str, Choice], left: int) -> dict[str, Choice]:
    """Spend leftover bytes on the exchanges that gain most for a byte, as long as one fits."""
    result = dict(chosen)
    while True:
        exchanges = [
            ((now.cost - choice.cost) / max(choice.nbytes - now.nbytes, 1), part, choice)
            for part, now in result.items()
            for choice in parts[part]
            if choice.cost < now.cost and choice.nbytes - now.nbytes <= left
        ]
        if not exchanges:
            return result
        _, part, choice = max(exchanges, key=lambda exchange: exchange[0])
        left -= choice.nbytes - result[part].nbytes
        result[part] = choice


def _bytes(chosen: Mapping[str, Choice]) -> int:
    return sum(choice.nbytes for choice in chosen.values())
