"""Which runtime serves an artifact best here, and why the others do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lowbit.core.errors import ServeError
from lowbit.runtimes import RUNTIMES, get_runtime
from lowbit.runtimes.artifact import Artifact
from lowbit.runtimes.description import Runtime, Support
from lowbit.runtimes.installed import has_package, program_of
from lowbit.runtimes.machine import Machine

# best first; others, of other packages, come after them
_PREFERENCE = {"cuda": ("vllm", "tensorrt-llm", "llama.cpp", "transformers"),
               "cpu": ("llama.cpp", "vllm", "transformers", "tensorrt-llm")}  # fmt: skip
_REASON = {
    "llama.cpp": "GGUF is its own format",
    "vllm": "the fastest for this format, many requests at once",
    "tensorrt-llm": "ModelOpt's format is its own",
    "transformers": "it loads every format of transformers; others are faster where they can be had",
}

Find = Callable[[Runtime, str, Path | None], tuple[str, ...] | None]


@dataclass(frozen=True)
class Choice:
    """What will serve, on which device, started how, and why; `passed`: why others were not taken, by name,
    and why on the CPU when there is a GPU."""

    runtime: Runtime
    device: str
    program: tuple[str, ...]
    why: str
    passed: dict[str, str]


def choose(
    artifact: Artifact,
    machine: Machine,
    *,
    name: str | None = None,
    device: str = "auto",
    program: Path | None = None,
    quantize_on_load: bool = False,
    find: Find = program_of,
    has: Callable[[tuple[str, ...], str], bool] = has_package,
) -> Choice:
    """The best runtime for `artifact` on `machine`, or the one called `name`.

    device: "auto", "cpu" or "cuda". program: see installed.program_of; it goes with a name. quantize_on_load: only
    bitsandbytes in transformers does that. Raises ServeError with every runtime's reason when none can.
    """
    if device == "cuda" and not machine.gpus:
        raise ServeError("there is no NVIDIA GPU on this machine that nvidia-smi knows", hint="--device cpu")
    devices = [device] if device != "auto" else (["cuda", "cpu"] if machine.gpus else ["cpu"])
    passed: dict[str, str] = {}
    for place in devices:
        for candidate in _candidates(place, name):
            runtime = get_runtime(candidate)
            reason = refuse(runtime, artifact, machine, place)
            if reason is None and quantize_on_load and candidate != "transformers" and name is None:
                reason = "quantizing while loading is left to bitsandbytes in transformers"
            found = None if reason else find(runtime, place, program)
            if reason is None and found is None:
                reason = f"not installed: {runtime.missing}"
            if reason is None and found is not None:
                reason = _plugin(runtime, artifact, found, has)
            if reason is None and found is not None:
                where = machine.what if place == "cuda" else f"{machine.cores} CPU cores"
                why = "asked for" if name else _REASON.get(candidate, "it can serve this")
                return Choice(runtime, place, found, f"{why}; {artifact.scheme} on {where}", passed)
            passed[candidate if place == devices[-1] else f"{candidate} on the GPU"] = reason or ""
    what = f"{artifact.name} ({artifact.format}, {artifact.scheme})"
    reasons = "; ".join(f"{runtime}: {reason}" for runtime, reason in passed.items())
    raise ServeError(f"no runtime can serve {what} on this machine", hint=reasons)


def refuse(runtime: Runtime, artifact: Artifact, machine: Machine, device: str) -> str | None:
    """Why `runtime` cannot serve `artifact` on `device`, with what would do; None when it can."""
    if device == "cpu" and not any(row.cpu for row in runtime.supports):
        return f"it needs an NVIDIA GPU; {runtime.missing}"
    for label in artifact.labels:
        row = runtime.support(artifact.format, label)
        reason = _refuse_row(runtime, row, f"{artifact.format} {label}", machine, device)
        if reason is not None:
            return reason
    return None


def _refuse_row(runtime: Runtime, row: Support | None, what: str, machine: Machine, device: str) -> str | None:
    if row is None:
        formats = sorted({name for row in runtime.supports if not row.refused for name in row.formats})
        return f"it does not read {what}; it reads {', '.join(formats)}"
    if row.refused:
        return row.refused
    if device == "cpu":
        return None if row.cpu else f"it has no CPU kernel for {what}"
    if row.capability is None:
        return f"it does not run {what} on NVIDIA GPUs"
    gpu = min(machine.gpus, key=lambda gpu: gpu.capability)
    has = f"{gpu.name} has {gpu.capability / 10:.1f}"
    if gpu.capability < row.capability:
        return f"{what} needs compute capability {row.capability / 10:.1f}, {has}; a scheme such as w4a16 runs from 7.5"
    if row.below is not None and gpu.capability >= row.below:
        return f"{what} runs below compute capability {row.below / 10:.1f} only, {has}; use fp8 or w4a16"
    return None


def _plugin(
    runtime: Runtime, artifact: Artifact, program: tuple[str, ...], has: Callable[[tuple[str, ...], str], bool]
) -> str | None:
    for label in artifact.labels:
        row = runtime.support(artifact.format, label)
        if row is not None and row.plugin is not None and not has(program, row.plugin):
            return f"{runtime.title} needs {row.plugin} for {artifact.format}: {program[0]} -m pip install {row.plugin}"
    return None


def _candidates(device: str, name: str | None) -> list[str]:
    if name is not None:
        return [get_runtime(name).name]
    return sorted(RUNTIMES.names(), key=lambda known: (*_PREFERENCE[device], known).index(known))
