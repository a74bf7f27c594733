"""Where a runtime's program is on this machine."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from lowbit.core.errors import ServeError, SideEnvironmentError
from lowbit.environments import python_of
from lowbit.runtimes.description import Runtime

_VLLM_MODULE = ("-m", "vllm.entrypoints.cli.main")
# what `transformers serve` imports
_SERVING = ("fastapi", "uvicorn", "openai")


def program_of(runtime: Runtime, device: str, given: Path | None = None) -> tuple[str, ...] | None:
    """The start of its command line; None when it is not installed for `device` ("cpu", "cuda").

    given: a program, or the Python of an environment that holds the runtime. Raises ServeError when that is not there.
    """
    if given is not None:
        return _given(runtime, given)
    if runtime.name == "llama.cpp" and _embeds_llama_cpp(device):
        return (sys.executable, "-m", "lowbit.runtimes.llama_server")
    if runtime.name == "transformers":
        ready = all(find_spec(name) is not None for name in _SERVING) and _torch_runs_on(device)
        return (sys.executable, *runtime.program[1:]) if ready else None
    environment = runtime.environments.get(device)
    if environment is not None:
        try:
            return (str(python_of(environment)), *_VLLM_MODULE)
        except SideEnvironmentError:
            pass
    found = shutil.which(runtime.program[0])
    return (found, *runtime.program[1:]) if found else None


def has_package(program: tuple[str, ...], package: str) -> bool:
    """Whether the Python that `program` starts with has `package`; True for a program that shows no Python."""
    if "python" not in Path(program[0]).name:
        return True
    code = f"import importlib.metadata as m; m.version({package!r})"
    return subprocess.run([program[0], "-c", code], capture_output=True, timeout=60).returncode == 0


def _embeds_llama_cpp(device: str) -> bool:
    """Whether xllamacpp is here, in a build for `device`: the one on PyPI is for CPUs."""
    if find_spec("xllamacpp") is None:
        return False
    if device == "cpu":
        return True
    import xllamacpp

    return any("GPU" in str(entry["type"]) for entry in xllamacpp.get_device_info())


def _torch_runs_on(device: str) -> bool:
    import torch

    return device == "cpu" or torch.cuda.is_available()


def _given(runtime: Runtime, given: Path) -> tuple[str, ...]:
    found = shutil.which(str(given))
    if found is None:
        raise ServeError(f"{given} is not a program that can be run", hint="give the path of a Python, or of a server")
    if not given.name.startswith("python"):
        return (found, *runtime.program[1:])
    if runtime.name == "vllm":
        return (found, *_VLLM_MODULE)
    if runtime.name == "transformers":
        return (found, *runtime.program[1:])
    raise ServeError(
        f"{runtime.title} is a program, not a module of {given}", hint=f"give the path of {runtime.program[0]}"
    )
