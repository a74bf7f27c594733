"""Limits of control groups, from files as Linux writes them."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from lowbit.core.container import free_memory, usable_cores, usable_memory


@pytest.fixture
def many_cores(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)), raising=False)
    return 64


@pytest.mark.parametrize(
    ("written", "cores"),
    [("max 100000\n", 64), ("400000 100000\n", 4), ("350000 100000\n", 3), ("50000 100000\n", 1), ("", 64)],
)
def test_cores(many_cores: int, tmp_path: Path, written: str, cores: int) -> None:
    assert usable_cores(tmp_path) == many_cores
    (tmp_path / "cpu.max").write_text(written)
    assert usable_cores(tmp_path) == cores


@pytest.mark.parametrize(("quota", "cores"), [("200000", 2), ("-1", 64), ("10000", 1)])
def test_cores_of_the_first_version(many_cores: int, tmp_path: Path, quota: str, cores: int) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text(quota)
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000")
    assert usable_cores(tmp_path) == cores


def test_memory(tmp_path: Path) -> None:
    total = psutil.virtual_memory().total
    assert usable_memory(tmp_path) == total
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("2000000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 500000\nactive_file 7\n")
    assert (usable_memory(tmp_path), free_memory(tmp_path)) == (3_000_000, 1_500_000)
    (tmp_path / "memory.current").write_text("9000000\n")  # a limit that was lowered
    assert free_memory(tmp_path) == 0
    (tmp_path / "memory.max").write_text("max\n")
    assert usable_memory(tmp_path) == total
    assert free_memory(tmp_path) > 3_000_000


def test_memory_of_the_first_version(tmp_path: Path) -> None:
    folder = tmp_path / "memory"
    folder.mkdir()
    (folder / "memory.usage_in_bytes").write_text("600000")
    (folder / "memory.stat").write_text("inactive_file 1\ntotal_inactive_file 100000\n")
    (folder / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert usable_memory(tmp_path) == psutil.virtual_memory().total
    (folder / "memory.limit_in_bytes").write_text("1000000\n")
    assert (usable_memory(tmp_path), free_memory(tmp_path)) == (1_000_000, 500_000)


def test_this_process() -> None:
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
    assert 0 < free_memory() <= usable_memory() <= psutil.virtual_memory().total
