"""Peak memory of a process is its own, not that of the program that started it."""

from __future__ import annotations

import subprocess
import sys

import numpy

PROGRAM = "import sys; from lowbit.core.resident import peak_resident; {}; print(peak_resident())"


def peak(work: str) -> float:
    """MiB that a process says it held."""
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(work)], capture_output=True, text=True, check=True)
    return int(done.stdout) / 2**20


def test_a_child_is_not_told_its_parents_size() -> None:
    held = numpy.ones(100 * 2**20, dtype=numpy.int8)
    idle = peak("pass")
    assert idle < held.nbytes / 2**20
    assert 60 <= peak("x = bytearray(64 * 2**20)") - idle <= 80
