"""Serve an artifact: everything is checked before a byte is loaded, then the runtime is started and watched."""

from __future__ import annotations

import ipaddress
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from lowbit.api.memory import Model, serving_memory
from lowbit.core.checkpoint import open_checkpoint
from lowbit.core.errors import ArchitectureError, CheckpointError, RecipeError, ServeError
from lowbit.environments import child_variables
from lowbit.recommend.memory import PARTS, Load, MemoryParts, Place, largest_context
from lowbit.runtimes.artifact import Artifact, read_artifact
from lowbit.runtimes.checksums import changed_files
from lowbit.runtimes.choose import Choice, choose
from lowbit.runtimes.client import Client
from lowbit.runtimes.description import ServeOptions
from lowbit.runtimes.machine import Machine, this_machine
from lowbit.runtimes.server import Server, free_port, require_free

DEFAULT_CONTEXT = 4096
_GIB = 2**30


@dataclass(frozen=True)
class ServePlan:
    """What would be started. memory: predicted, None where the model's shapes are unknown to the memory model; budget:
    bytes it has to fit in. key: the API key; it goes to the runtime by a variable, never by its command line."""

    artifact: Artifact
    choice: Choice
    options: ServeOptions
    memory: MemoryParts | None
    budget: int
    key: str | None = None

    @property
    def argv(self) -> list[str]:
        """The command line."""
        return self.choice.runtime.argv(self.artifact, self.options, self.choice.program)

    @property
    def model(self) -> str:
        """What clients call the model."""
        return self.options.name or self.artifact.name

    @property
    def url(self) -> str:
        """Where clients find it, with /v1."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.options.host, self.options.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.options.port}/v1"

    @property
    def client(self) -> Client:
        """A client of it."""
        return Client(self.url, self.model, self.key)

    def variables(self) -> dict[str, str]:
        """The child's whole environment."""
        runtime = self.choice.runtime
        # our launchers run on this very Python; any other one must not be led astray by its variables
        base = dict(os.environ) if self.choice.program[0] == sys.executable else child_variables()
        own = {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", **runtime.variables(self.artifact, self.options)}
        if self.key is not None and runtime.api_key_variable is not None:
            own[runtime.api_key_variable] = self.key
        return base | own


def plan(
    model: str | Path,
    *,
    runtime: str | None = None,
    options: ServeOptions | None = None,
    device: str = "auto",
    program: Path | None = None,
    key: str | None = None,
    insecure: bool = False,
    verify: bool = True,
    machine: Machine | None = None,
) -> ServePlan:
    """Check everything that can be known before a byte of weights is loaded, and choose the runtime.

    model: artifact or checkpoint directory, .gguf file or hub id. options: `device` is filled in here, and so are `context`
    and `threads` where they are None; port 0 picks a free one, tensor_parallel 0 as few GPUs as the model fits on. program:
    see runtimes.installed.program_of. verify: compare an artifact's files with its checksums. Raises LowbitError
    subclasses, with what would do instead.
    """
    asked = options or ServeOptions()
    here = machine or this_machine()
    artifact = read_artifact(_local(model))
    if verify:
        _require_unchanged(artifact)
    if asked.bitsandbytes is not None and artifact.format != "dense":
        raise RecipeError(
            f"{artifact.name} is quantized already ({artifact.scheme}), so it cannot be quantized while loading",
            hint="leave LOAD_IN_8BIT, LOAD_IN_4BIT and --load-in out, or serve the unquantized model",
        )
    choice = choose(artifact, here, name=runtime, device=device, program=program,
                    quantize_on_load=asked.bitsandbytes is not None)  # fmt: skip
    if asked.bitsandbytes is not None and choice.runtime.name != "transformers":
        raise RecipeError("only the transformers runtime quantizes while loading", hint="--runtime transformers")
    _require_key(choice, asked.host, key, insecure)
    filled = _filled(asked, artifact, choice, here)
    filled, memory, budget = _memory(artifact, choice, filled, here)
    if memory is not None and choice.device == "cpu":
        filled = replace(filled, cache_gib=asked.cache_gib or math.ceil(memory.cache / _GIB))
    require_free(filled.host, filled.port)
    return ServePlan(artifact, choice, filled, memory, budget, key)


@contextmanager
def serving(
    planned: ServePlan, *, patience: float = 600.0, on_line: Callable[[str], None] = lambda line: None
) -> Iterator[Server]:
    """Start what was planned, wait until it answers, and stop it in the end. on_line hears the runtime's output.

    Raises ServeError when it does not get ready within `patience` seconds; what it said last is in the message.
    """
    server = start(planned, on_line)
    try:
        server.wait_ready(patience)
        yield server
    finally:
        server.stop(planned.options.drain)


def start(planned: ServePlan, on_line: Callable[[str], None] = lambda line: None) -> Server:
    """Start what was planned; the caller waits for it and stops it."""
    return Server(planned.choice.runtime.title, planned.argv, planned.variables(), planned.client, on_line)


def _local(model: str | Path) -> Path:
    path = Path(model)
    if path.exists() or path.suffix == ".gguf":
        return path
    return open_checkpoint(model).location


def _require_unchanged(artifact: Artifact) -> None:
    expected = (artifact.record or {}).get("checksums") or {}
    location = Path(artifact.location)
    folder = location if location.is_dir() else location.parent
    changed = changed_files(folder, expected)
    if changed:
        raise CheckpointError(
            f"{', '.join(changed)} in {folder} differ from their checksums, so nothing was started",
            hint="copy or quantize it again; --no-verify serves it all the same",
        )


def _require_key(choice: Choice, host: str, key: str | None, insecure: bool) -> None:
    if key is not None and choice.runtime.api_key_variable is None:
        raise ServeError(
            f"{choice.runtime.title} knows no API keys", hint="put a proxy that asks for one before it, and --insecure"
        )
    if key is None and not insecure and not _is_loopback(host):
        raise ServeError(
            f"{host} can be reached from other machines, and no API key was given; nothing was started",
            hint="--api-key KEY (or LOWBIT_API_KEY), --host 127.0.0.1, or --insecure",
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _filled(asked: ServeOptions, artifact: Artifact, choice: Choice, machine: Machine) -> ServeOptions:
    longest = artifact.context or DEFAULT_CONTEXT
    if asked.context is not None and asked.context > longest:
        raise ServeError(
            f"{artifact.name} was made for {longest} tokens, not {asked.context}", hint=f"--context {longest}"
        )
    threads = asked.threads
    if threads is None and choice.runtime.name in ("llama.cpp", "transformers"):
        threads = machine.cores
    return replace(
        asked,
        gpu_memory=_gpu_share(asked, choice, machine),
        device=choice.device,
        context=asked.context or min(longest, DEFAULT_CONTEXT),
        threads=threads,
        port=asked.port or free_port(asked.host),
    )


def _gpu_share(asked: ServeOptions, choice: Choice, machine: Machine) -> float:
    """What was asked for, or what others left free: vLLM does not start when it is promised more than that."""
    if choice.device == "cpu" or choice.runtime.name != "vllm":
        return asked.gpu_memory
    free = min(gpu.free / gpu.memory for gpu in machine.gpus)
    return min(asked.gpu_memory, math.floor(100 * free) / 100)


def _memory(
    artifact: Artifact, choice: Choice, asked: ServeOptions, machine: Machine
) -> tuple[ServeOptions, MemoryParts | None, int]:
    """The options with the GPUs it takes, predicted memory and what there is. Raises ServeError, with what would fit, when
    it is too little."""
    counts = [asked.tensor_parallel] if asked.tensor_parallel else _gpu_counts(artifact, choice, machine)
    for count in counts:
        options = replace(asked, tensor_parallel=count)
        budget = _budget(choice, options, machine)
        need = _need(artifact, choice, options)
        if need is None or need.total <= budget:
            return options, need, budget
    assert need is not None
    raise _too_little(artifact, choice, options, need, budget)


def _gpu_counts(artifact: Artifact, choice: Choice, machine: Machine) -> list[int]:
    """Numbers of GPUs that divide the attention heads, few first; 1 where the runtime does not split a model so."""
    if choice.device == "cpu" or choice.runtime.name not in ("vllm", "tensorrt-llm"):
        return [1]
    heads = int(artifact.config.get("num_attention_heads") or 1)
    return [count for count in range(1, len(machine.gpus) + 1) if count == 1 or heads % count == 0]


def _budget(choice: Choice, options: ServeOptions, machine: Machine) -> int:
    if choice.device == "cpu":
        return machine.memory
    # llama.cpp and transformers spread a model over all GPUs by themselves
    split = choice.runtime.name in ("vllm", "tensorrt-llm")
    gpus = machine.gpus[: options.tensor_parallel] if split else machine.gpus
    return sum(min(gpu.free, int(gpu.memory * options.gpu_memory)) for gpu in gpus)


def _need(artifact: Artifact, choice: Choice, options: ServeOptions) -> MemoryParts | None:
    """None for a family or runtime that the memory model does not know: the runtime will say."""
    place: Place = "gpu" if choice.device == "cuda" else "cpu"
    try:
        need = serving_memory(artifact.location, runtime=choice.runtime.name, place=place,
                              context=options.context or DEFAULT_CONTEXT, concurrency=options.parallel,
                              devices=options.tensor_parallel)  # fmt: skip
    except (ArchitectureError, RecipeError):
        return None
    if options.bitsandbytes is not None:  # weights shrink while they are loaded, one by one
        return replace(need, weights=need.weights * options.bitsandbytes.bits // 16)
    return need


def _too_little(
    artifact: Artifact, choice: Choice, options: ServeOptions, need: MemoryParts, budget: int
) -> ServeError:
    context = options.context or DEFAULT_CONTEXT
    fits = largest_context(need.weights, Model(artifact.location).shape, Load(context, options.parallel),
                           choice.runtime.name, "gpu" if choice.device == "cuda" else "cpu", budget,
                           options.tensor_parallel)  # fmt: skip
    knobs = [f"--context {fits}"] if fits else []
    if options.parallel > 1:
        knobs.append("a smaller --parallel")
    knobs.append("fewer bits (lowbit recommend), or a machine with more memory")
    parts = ", ".join(f"{part} {getattr(need, part) / _GIB:.2f}" for part in PARTS)
    return ServeError(
        f"{artifact.name} needs about {need.total / _GIB:.2f} GiB in {choice.runtime.title} at {options.parallel} x "
        f"{context} tokens ({parts}), and {budget / _GIB:.2f} GiB are free; nothing was started",
        hint=", ".join(knobs),
    )
