"""Peak memory of a process is its own, not that of the program that started it."""

from __future__ import annotations

import subprocess
import sys

import numpy
import pytest

PROGRAM = "import sys; from lowbit.core.resident import peak_resident; {}; print(peak_resident())"


def peak(work: str) -> float:
    """MiB that a process says it held."""
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(work)], capture_output=True, text=True, check=True)
    return int(done.stdout) / 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_what_was_freed_is_given_back() -> None:
    """Pieces too small for mmap, freed but for every hundredth: the pages in between go back."""
    held = PROGRAM.replace("print(peak_resident())", "{}")
    read = "int(open('/proc/self/statm').read().split()[1]) * 4096"
    work = f"x = [bytes(100000) for _ in range(2000)]; x = x[::100]; a = {read}"
    program = held.format(work, f"from lowbit.core.resident import give_back; give_back(); print(a - {read})")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 100 * 2**20


def test_a_child_is_not_told_its_parents_size() -> None:
    held = numpy.ones(100 * 2**20, dtype=numpy.int8)
    idle = peak("pass")
    assert idle < held.nbytes / 2**20
    assert 60 <= peak("x = bytearray(64 * 2**20)") - idle <= 80
