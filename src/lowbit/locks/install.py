"""The steps that turn an empty directory into an environment; environments.py says WHEN they run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from lowbit.core.errors import SideEnvironmentError
from lowbit.locks import EnvironmentSpec, Step

TAIL_LINES = 12
DIAGNOSED_LINES = 100
PYTHON_VARIABLES = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")


def interpreter(target: Path) -> Path:
    """The Python of the environment in `target`."""
    return target / "bin" / "python"


def child_variables(variables: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment variables without those that would lead a side environment's Python astray, plus
    `variables`."""
    return {k: v for k, v in os.environ.items() if k not in PYTHON_VARIABLES} | dict(variables or {})


def create(spec: EnvironmentSpec, target: Path, say: Callable[[str], None], lock: int) -> None:
    """A virtual environment of this Python in `target`, with the spec's shims."""
    command = [sys.executable, "-m", "venv", str(target)]
    run(command, f"The environment {spec.name!r} could not be made", say, lock)
    write_shims(spec, target)


def install(
    spec: EnvironmentSpec, step: Step, target: Path, say: Callable[[str], None], torch_index: str | None, lock: int
) -> None:
    """One pip run. Every pin of the lock is a constraint, so that what pip adds by itself is the lock's too."""
    forget_half_installed(target)
    pip = [str(interpreter(target)), "-m", "pip", "install", "--no-input", "--progress-bar=off"]
    pip += ["--disable-pip-version-check", "--no-warn-script-location"]
    if torch_index and step.torch:
        pip += ["--index-url", torch_index]
    with tempfile.TemporaryDirectory() as folder:
        constraints, requirements = Path(folder) / "constraints.txt", Path(folder) / "requirements.txt"
        constraints.write_text("\n".join(spec.pins) + "\n")
        requirements.write_text("\n".join(step.requirements) + "\n")
        pip += ["--constraint", str(constraints)] if step.dependencies else ["--no-deps"]
        failure = f"Step {step.name!r} of {spec.name!r} could not be installed, the steps before it are kept"
        run([*pip, "-r", str(requirements)], failure, say, lock)


def check(spec: EnvironmentSpec, target: Path, say: Callable[[str], None], lock: int) -> None:
    """Run the spec's check command. Raises SideEnvironmentError when it fails."""
    command = [str(interpreter(target)), *spec.check]
    run(command, f"The environment {spec.name!r} was installed but its check failed", say, lock)


def run(command: list[str], failure: str, say: Callable[[str], None], lock: int) -> None:
    """Run a builder process, handing its lines to `say`. Raises SideEnvironmentError with its last lines.

    The child inherits the descriptor `lock`: when lowbit is killed, nobody else touches the environment before an
    orphaned pip is done.
    """
    tail: deque[str] = deque(maxlen=DIAGNOSED_LINES)
    process = subprocess.Popen(
        command,
        env=child_variables({"PYTHONUNBUFFERED": "1"}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        pass_fds=[lock],
    )
    with process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.strip():
                    tail.append(line.rstrip())
                    say(line.strip())
        except BaseException:  # an interrupt, or an error in `say`: either way the child must not go on alone
            process.terminate()
            raise
    if process.returncode != 0:
        cause, hint = diagnose("\n".join(tail))
        raise SideEnvironmentError(f"{failure}: {cause} (exit code {process.returncode}).{quote(tail)}", hint=hint)


def diagnose(output: str) -> tuple[str, str]:
    """The last lines of a failed builder process -> (cause, hint)."""
    again = "run the same command again: it continues where it stopped"
    if "No space left on device" in output or "Errno 28" in output:
        return "the disk is full", f"free some space, then {again}"
    if any(sign in output for sign in ("NewConnectionError", "NameResolutionError", "ConnectTimeout", "ReadTimeout")):
        return "the package index could not be reached", f"check the network or pip's index settings, then {again}"
    if "ensurepip" in output:
        return "this Python cannot make virtual environments", "apt install python3-venv"
    if "No matching distribution" in output:
        return "the package index does not have a pinned version", "check pip's index settings (pip config list)"
    return "the command failed", f"see its last lines above; then {again}"


def quote(lines: Iterable[str]) -> str:
    """The last lines of a program's output, indented, for the end of an error message."""
    return "".join(f"\n    {line}" for line in list(lines)[-TAIL_LINES:])


def write_shims(spec: EnvironmentSpec, target: Path) -> None:
    """Metadata folders beside site-packages, on the path by a .pth file: pip neither lists nor touches them."""
    for shim in spec.shims:
        folder = target / "shims" / f"{shim.name}-{shim.version}.dist-info"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {shim.name}\nVersion: {shim.version}\n")
    if spec.shims:
        (site_packages(target) / "lowbit-shims.pth").write_text(f"{target / 'shims'}\n")


def forget_half_installed(target: Path) -> None:
    """pip writes INSTALLER after a package's last file: without it the package broke off, and pip must not count it as
    installed (source: pip, _internal/operations/install/wheel.py, `_install_wheel`)."""
    for folder in site_packages(target).glob("*.dist-info"):
        if not (folder / "INSTALLER").exists():
            shutil.rmtree(folder)


def site_packages(target: Path) -> Path:
    """Where the environment's packages lie."""
    return target / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
