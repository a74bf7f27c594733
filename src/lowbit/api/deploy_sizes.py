"""How many GPUs and how much memory a server needs, from the memory model of `lowbit recommend`."""

from __future__ import annotations

from lowbit.api.deploy_wish import ServeWish
from lowbit.api.memory import Model
from lowbit.core.errors import LowbitError, RecipeError
from lowbit.recommend.hardware import Hardware
from lowbit.recommend.memory import Load, MemoryParts, serving_parts
from lowbit.runtimes.artifact import Artifact
from lowbit.runtimes.description import Runtime, ServeOptions

GIB = 2**30


def gpus_and_memory(
    runtime: Runtime, artifact: Artifact, shapes: Model | None, wish: ServeWish, hardware: Hardware | None, device: str
) -> tuple[int, MemoryParts | None]:
    """GPUs of one pod, and memory. Raises RecipeError when it does not fit the hardware."""
    if device == "cpu":
        need = _need(runtime, artifact, shapes, wish, 1, device)
        if hardware is not None and need is not None and need.needed > hardware.memory:
            raise RecipeError(f"{artifact.name} needs {need.needed / GIB:.1f} GiB, {hardware.name} has "
                              f"{hardware.memory / GIB:.1f}", hint="a smaller --context, or fewer bits")  # fmt: skip
        return 0, need
    splits = runtime.name in ("vllm", "tensorrt-llm")
    asked = wish.gpus is not None or hardware is None
    # tensor parallelism gives every GPU the same number of attention heads
    heads = shapes.shape.heads if shapes is not None and splits else 0
    offered = [wish.gpus or 1] if asked else [1, 2, 4, 8] if splits else [1]
    counts = [gpus for gpus in offered if heads % (gpus * wish.nodes) == 0]
    if not counts:
        raise RecipeError(f"the {heads} attention heads of {artifact.name} cannot be split over "
                          f"{offered[0] * wish.nodes} GPUs", hint="a number of GPUs that divides them")  # fmt: skip
    need = None
    for gpus in counts:
        need = _need(runtime, artifact, shapes, wish, gpus * wish.nodes, device)
        if need is None or hardware is None or need.total <= 0.9 * hardware.memory * gpus * wish.nodes:
            return gpus, need
    assert need is not None
    assert hardware is not None
    raise RecipeError(
        f"{artifact.name} needs {need.total / GIB:.1f} GiB, more than {counts[-1]} x {hardware.name} have",
        hint="fewer bits, a smaller --context or --parallel, or --nodes",
    )


def _need(
    runtime: Runtime, artifact: Artifact, shapes: Model | None, wish: ServeWish, devices: int, device: str
) -> MemoryParts | None:
    if shapes is None:
        return None
    weights = artifact.weight_bytes
    if wish.bitsandbytes is not None:
        weights = weights * wish.bitsandbytes.bits // 16
    load = Load(context_of(artifact, wish), wish.parallel)
    try:
        return serving_parts(weights, shapes.shape, load, runtime.name, "gpu" if device == "cuda" else "cpu", devices,
                             weights if artifact.format == "gguf" and device == "cpu" else 0)  # fmt: skip
    except LowbitError:
        return None


def context_of(artifact: Artifact, wish: ServeWish) -> int:
    """Tokens of a sequence. Raises RecipeError for more than the model was made for."""
    longest = artifact.context or 4096
    if wish.context is not None and wish.context > longest:
        raise RecipeError(f"{artifact.name} was made for {longest} tokens, not {wish.context}",
                          hint=f"--context {longest}")  # fmt: skip
    return wish.context or min(longest, 4096)


def host_memory(
    artifact: Artifact, memory: MemoryParts | None, device: str, gpus: int, shm: int, options: ServeOptions
) -> int:
    """Bytes of the container. Beside a GPU: the runtime's processes, and the files while they are read; on a CPU, the
    memory model's sum with a tenth to spare. /dev/shm counts into the limit."""
    if device == "cuda":
        return shm + 6 * GIB + 2 * GIB * max(gpus, 1) + artifact.weight_bytes
    if memory is None:
        return shm + 4 * GIB + 2 * artifact.weight_bytes
    cache = max(0, options.cache_gib * GIB - memory.cache) if options.cache_gib else 0
    # bitsandbytes shrinks weights one by one, from files that are read meanwhile
    files = artifact.weight_bytes // 4 if options.bitsandbytes is not None else 0
    return int(1.1 * (memory.total + cache + files)) + shm + GIB // 2
