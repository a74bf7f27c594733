"""A model and a runtime -> the spec of its deployment: the runtime's own command, memory and probes from the bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError

from lowbit.api.deploy_artifact import deployed_artifact, location_of, model_source, opened
from lowbit.api.deploy_images import lowbit_image, runtime_image
from lowbit.api.deploy_sizes import GIB, context_of, gpus_and_memory, host_memory
from lowbit.api.deploy_wish import ServeWish
from lowbit.core.errors import RecipeError
from lowbit.deploy.objects.metrics import QUEUES
from lowbit.deploy.spec import ServeSpec, dns_name
from lowbit.recommend.hardware import Hardware, parse_hardware
from lowbit.recommend.memory import MemoryParts
from lowbit.runtimes import get_runtime
from lowbit.runtimes.artifact import Artifact
from lowbit.runtimes.choose import refuse
from lowbit.runtimes.description import Runtime, ServeOptions
from lowbit.runtimes.machine import Gpu, Machine

# seconds from loaded to ready: graphs and kernels are compiled, caches allotted
_WARMUP = {("vllm", "cuda"): 240, ("vllm", "cpu"): 180, ("llama.cpp", "cpu"): 20, ("llama.cpp", "cuda"): 30,
           ("tensorrt-llm", "cuda"): 300}  # fmt: skip


@dataclass(frozen=True)
class ServeDeployment:
    """A spec, what it was made from, and the memory on the serving device (None: the model is unknown to the model)."""

    spec: ServeSpec
    artifact: Artifact
    options: ServeOptions
    runtime: Runtime
    memory: MemoryParts | None
    hardware: Hardware | None


def serve_spec(model: str | Path, wish: ServeWish) -> ServeDeployment:
    """The spec of serving `model`: an artifact, .gguf file or hub id as it is, or what `wish.method` will make of it.

    Raises LowbitError subclasses for what the runtime or the hardware cannot do, with what would do instead.
    """
    runtime = get_runtime(wish.runtime)
    hardware = parse_hardware(wish.hardware) if wish.hardware else None
    device = _device(wish, hardware)
    shapes = opened(model)
    artifact = deployed_artifact(model, wish, shapes)
    _check(runtime, artifact, wish, hardware, device)
    source = model_source(model, wish, artifact)
    inside = replace(artifact, location=location_of(source, artifact, wish))
    gpus, memory = gpus_and_memory(runtime, artifact, shapes, wish, hardware, device)
    cpu = wish.cpu or (8 if device == "cpu" else 4 * max(gpus, 1))
    options = ServeOptions(
        host="0.0.0.0",
        port=runtime.port,
        name=artifact.name,
        context=context_of(artifact, wish),
        parallel=wish.parallel,
        threads=cpu if device == "cpu" else None,
        device=device,
        tensor_parallel=gpus * wish.nodes if device == "cuda" else 1,
        cache_gib=math.ceil(memory.cache / GIB) if memory and device == "cpu" else 0,
        bitsandbytes=wish.bitsandbytes,
        drain=wish.drain,
        extra=wish.extra,
    )
    shm = 2 * GIB * gpus if runtime.name in ("vllm", "tensorrt-llm") and gpus else GIB if runtime.name == "vllm" else 0
    program = runtime.program if runtime.image_program is None else runtime.image_program
    metric = QUEUES.get(runtime.name)
    _check_scaling(wish, runtime, device)
    name = dns_name(wish.name or artifact.name)
    try:
        spec = ServeSpec(
            name=name,
            image=runtime_image(runtime, device, wish.image),
            command=program,
            args=tuple(runtime.argv(inside, options, ())),
            env={"HF_HUB_OFFLINE": "1", **runtime.variables(inside, options)},
            cpu=cpu,
            memory=wish.memory or host_memory(artifact, memory, device, gpus, shm, options),
            gpus=gpus,
            node_selector=wish.node_selector or {},
            token_secret=wish.token_secret,
            runtime=runtime.name,
            model=artifact.name,
            location=inside.location,
            source=source,
            weight_bytes=artifact.weight_bytes,
            port=runtime.port,
            health_path=runtime.health_path,
            metrics_path=runtime.metrics_path or "",
            metrics_key=runtime.metrics_path is not None and runtime.metrics_path not in runtime.open_paths,
            api_key_variable=runtime.api_key_variable or "",
            api_key_secret=f"{name}-api-key" if wish.secret is None else wish.secret,
            shm=shm,
            warmup=_WARMUP.get((runtime.name, device), 60),
            drain=wish.drain,
            replicas=wish.replicas,
            max_replicas=max(wish.max_replicas, wish.replicas),
            autoscale=wish.autoscale,
            metric=metric,
            monitoring=wish.monitoring,
            route=wish.route,
            host=wish.host,
            nodes=wish.nodes,
            kserve=wish.kserve,
            puller=lowbit_image("cpu", wish.puller) if source.kind == "pull" else None,
            threads=device == "cpu",
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise RecipeError(
            f"{'.'.join(map(str, first['loc']))}: {first['msg']}", hint="lowbit deploy serve -h"
        ) from error
    return ServeDeployment(spec, artifact, options, runtime, memory, hardware)


def _device(wish: ServeWish, hardware: Hardware | None) -> str:
    if wish.device != "auto":
        return wish.device
    if hardware is not None:
        if hardware.kind == "apple":
            raise RecipeError("no cluster node is an Apple GPU", hint="lowbit serve runs there")
        return "cuda" if hardware.kind == "gpu" else "cpu"
    return "cpu" if wish.runtime == "llama.cpp" and not wish.gpus else "cuda"


def _check(runtime: Runtime, artifact: Artifact, wish: ServeWish, hardware: Hardware | None, device: str) -> None:
    if wish.nodes > 1 and (runtime.name != "vllm" or device != "cuda"):
        raise RecipeError(f"{runtime.title} is not deployed over several nodes here", hint="--runtime vllm with GPUs")
    if wish.nodes > 1 and wish.autoscale != "none":
        raise RecipeError("a group of several nodes is not scaled here", hint="--autoscale none")
    if wish.kserve and (runtime.name != "vllm" or wish.nodes > 1):
        raise RecipeError("LLMInferenceService here is for vLLM on one node", hint="without --kserve")
    if wish.bitsandbytes is not None and (runtime.name != "transformers" or artifact.format != "dense"):
        raise RecipeError("quantizing while loading is for unquantized models in transformers",
                          hint="--runtime transformers, or no --load-in")  # fmt: skip
    unquantized = runtime.name == "llama.cpp" and artifact.format != "gguf" and wish.method is None
    hint = "--method q4_k_m serves what that will give" if unquantized else "lowbit recommend"
    if hardware is not None or device == "cpu":
        gpus = () if hardware is None or device == "cpu" else (
            Gpu(hardware.name, round(hardware.cc * 10), hardware.memory, hardware.memory),)  # fmt: skip
        reason = refuse(runtime, artifact, Machine(1, 0, gpus), device)
    else:
        rows = [runtime.support(artifact.format, each) for each in artifact.labels]
        reason = next((row.refused for row in rows if row is not None and row.refused), None)
        if None in rows:
            reason = f"it does not read {artifact.format} {artifact.scheme}"
    if reason is not None:
        raise RecipeError(f"{runtime.title} cannot serve {artifact.name}: {reason}", hint=hint)
    plugins = {row.plugin for each in artifact.labels if (row := runtime.support(artifact.format, each)) and row.plugin}
    if plugins and wish.image is None:
        raise RecipeError(
            f"{runtime.title} needs {', '.join(sorted(plugins))} for {artifact.format}, which its image lacks",
            hint="--image of one that you added it to (see docs/deploy.md), or another method",
        )


def _check_scaling(wish: ServeWish, runtime: Runtime, device: str) -> None:
    if wish.autoscale == "none" or QUEUES.get(runtime.name) is not None:
        return
    if wish.autoscale == "keda" or device == "cuda":
        raise RecipeError(
            f"{runtime.title} exports no queue that could be scaled on, and CPUs say little where a GPU works",
            hint="--autoscale none, or --runtime vllm",
        )
