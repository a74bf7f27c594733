"""The entry point of the `lowbit` script without a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lowbit.cli import main

Run = Callable[..., subprocess.CompletedProcess[str]]


def in_this_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """What runs the script with given arguments; `cache` is its XDG_CACHE_HOME."""

    def called(*arguments: str | Path, cache: Path | None = None) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["lowbit", *map(str, arguments)])
        if cache is not None:
            monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return subprocess.CompletedProcess(sys.argv, int(ended.value.code or 0), said.out, said.err)

    return called
