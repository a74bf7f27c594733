"""One factorization against the textbook's: invert in float64, then factor the inverse."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import lowbit.methods.hessian as hessian_module
from lowbit.core.distributed import World
from lowbit.core.errors import CalibrationError
from lowbit.methods.hessian import factor, invert_lower_, shared_inverse_factor_, turn_


def positive(columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(columns * 2, columns, generator=generator) * (torch.rand(columns, generator=generator) + 0.1)
    return inputs.T @ inputs / len(inputs)


@pytest.mark.parametrize("columns", [1, 7, 64, 1300])  # 1300: the inverse is made of parts
def test_upper_is_the_cholesky_factor_of_the_inverse_in_the_order_of_rounding(columns: int) -> None:
    hessian = positive(columns)
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(1))
    found = factor(hessian, order, 0.02)
    inverse = torch.linalg.inv(hessian.double() + 0.02 * torch.eye(columns))
    expected = torch.linalg.cholesky(inverse[order][:, order], upper=True)
    torch.testing.assert_close(found.upper.double(), expected, rtol=1e-3, atol=1e-4)
    assert found.upper.tril(-1).eq(0).all()
    torch.testing.assert_close(found.cost[order].double(), expected.diagonal() ** -2, rtol=1e-3, atol=1e-6)
    left = torch.randn(5, columns, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(
        found.times_inverse(left), (left.double() @ inverse).float(), rtol=1e-3, atol=1e-3 * inverse.abs().max().item()
    )
    assert found.order.equal(order)
    assert found.damp == 0.02


def test_cost_in_text_is_that_of_a_unit_of_error_and_what_makes_up_for_it() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 48, generator=generator) * torch.logspace(0, -2, 48)
    hessian, order = inputs.T @ inputs / 200, torch.randperm(48, generator=generator)
    found = factor(hessian, order, 0.05 * hessian.diagonal().mean().item())
    damped = hessian + found.damp * torch.eye(48)
    for place, column in enumerate(order.tolist()):
        later = order[place + 1 :]
        # an error of one in this column, and in later columns what lowers the damped error most
        error = torch.zeros(48)
        error[column] = 1.0
        error[later] = -torch.linalg.solve(damped[later][:, later], damped[later, column])
        assert found.cost[column] == pytest.approx((error @ damped @ error).item(), rel=1e-3)
        assert found.cost_in_text()[column] == pytest.approx((error @ hessian @ error).item(), rel=1e-2, abs=1e-7)


def test_damping_grows_until_it_is_enough() -> None:
    hessian = positive(16)
    hessian[0, 1] = hessian[1, 0] = 1.3 * hessian.diagonal()[:2].max()
    found = factor(hessian, torch.arange(16), 0.01)
    assert found.damp in (0.1, 1.0, 10.0)
    expected = torch.linalg.cholesky(torch.linalg.inv(hessian + found.damp * torch.eye(16)), upper=True)
    torch.testing.assert_close(found.upper, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("fill", [float("nan"), float("inf"), -1e6])
def test_what_cannot_be_factored_is_refused(fill: float) -> None:
    with pytest.raises(CalibrationError, match="could not be factored"):
        factor(torch.full((8, 8), fill), torch.arange(8), 0.01)


@pytest.mark.parametrize("columns", [1, 2, 5, 127, 128, 129, 300])
def test_turned_is_flipped(columns: int) -> None:
    matrix = torch.randn(columns, columns, generator=torch.Generator().manual_seed(0))
    expected = matrix.flip(0, 1)
    turn_(matrix)
    assert matrix.equal(expected)


def test_triangular_inverse_of_parts() -> None:
    lower = torch.linalg.cholesky(positive(1100).double() + 0.1 * torch.eye(1100))
    inverse = lower.clone()
    invert_lower_(inverse)
    torch.testing.assert_close(inverse @ lower, torch.eye(1100, dtype=torch.float64), rtol=0, atol=1e-9)


class Together:
    """What processes tell each other, between threads of this one."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier, self.said = size, threading.Barrier(size, timeout=60), [torch.empty(0)] * size

    def run(self, work: Callable[[World], Any]) -> list[Any]:
        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(lambda rank: work(Member(rank, self.size, self)), range(self.size)))


@dataclass(frozen=True)
class Member(World):
    others: Together | None = None

    def begin_same_(self, tensor: torch.Tensor, rank: int) -> Callable[[], None]:
        told = self._told(tensor)[rank]
        tensor.fill_(torch.nan)  # nobody may look before the wait is over

        def wait() -> None:
            tensor.copy_(told)

        return wait

    def concatenate(self, part: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        told = self._told(part)
        assert [len(one) for one in told] == list(lengths)
        return torch.cat(told)

    def _told(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        assert self.others is not None
        assert tensor.is_contiguous()
        self.others.said[self.rank] = tensor.clone()
        self.others.barrier.wait()
        said = list(self.others.said)
        self.others.barrier.wait()
        return said


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("columns", [1, 16, 64, 100])
def test_shared_inverse_factor_is_the_inverse_of_the_cholesky_factor(columns: int, processes: int) -> None:
    hessian = positive(columns) + 0.02 * torch.eye(columns)
    matrices = [hessian.clone() for _ in range(processes)]
    done = Together(processes).run(lambda world: shared_inverse_factor_(matrices[world.rank], world, width=16))
    assert done == [True] * processes
    expected = torch.linalg.inv(torch.linalg.cholesky(hessian.double()))
    torch.testing.assert_close(matrices[0].double(), expected, rtol=1e-3, atol=1e-4)
    assert matrices[0].triu(1).eq(0).all()
    assert all(matrix.equal(matrices[0]) for matrix in matrices)


def test_shared_factor_is_the_one_that_a_process_finds_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hessian_module, "_SHARED", 8)
    monkeypatch.setattr(hessian_module, "_WIDTH", 8)
    hessian, order = positive(40), torch.randperm(40, generator=torch.Generator().manual_seed(1))
    hessian[0, 1] = hessian[1, 0] = 1.3 * hessian.diagonal()[:2].max()  # not positive definite until it is damped
    alone, together = factor(hessian, order, 0.01), Together(2)
    shared = together.run(lambda world: factor(hessian, order, 0.01, world))
    assert alone.damp > 0.01
    assert all(len(said) for said in together.said), "nothing was shared"
    for one in shared:
        assert one.damp == alone.damp
        torch.testing.assert_close(one.upper, alone.upper, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(one.cost, alone.cost, rtol=1e-3, atol=1e-6)
